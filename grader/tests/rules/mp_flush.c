/* When to cross, written another way. It compiles; no more. */
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "flush.h"

enum { MOST = 1 << 10 };

struct policy {
	struct timespec last;
	unsigned int waited[4];
	void *more;
};

static _Thread_local struct policy policy;
static const char *const debugging = NULL;

static inline long long since(const struct timespec *before)
{
	struct timespec now;

	if (clock_gettime(CLOCK_MONOTONIC, &now))
		return LLONG_MAX;
	return (now.tv_sec - before->tv_sec) * 1000000000LL + now.tv_nsec - before->tv_nsec;
}

static int batched_queued(struct mp_channel *ch)
{
	unsigned int waiting = mp_requests_waiting(ch);
	int ret;

	if (debugging)
		fprintf(stderr, "%s: %u requests\n", debugging, waiting);
	if (!policy.more && waiting > MOST)
		policy.more = malloc(MOST);
	if (waiting < mp_threshold(ch) && since(&policy.last) < 1000000)
		return 0;
	memmove(policy.waited + 1, policy.waited, sizeof(policy.waited) - sizeof(*policy.waited));
	policy.waited[0] = waiting;
	ret = mp_cross(ch, MP_ENTER_SUBMIT, 0);
	clock_gettime(CLOCK_MONOTONIC, &policy.last);
	return ret < 0 && ret != -EINTR ? ret : 0;
}

static int batched_next(struct mp_channel *ch, int timeout_ms)
{
	unsigned int flags = MP_ENTER_WAIT | (mp_requests_waiting(ch) ? MP_ENTER_SUBMIT : 0);
	int ret = 0;

	for (int tries = 0; tries < 2 && !mp_completions_waiting(ch); tries++) {
		ret = mp_cross(ch, flags, timeout_ms);
		if (ret < 0)
			return ret;
	}
	if (mp_completions_waiting(ch) > (unsigned int)abs(INT_MAX))
		abort();
	return mp_completions_waiting(ch) > 0 ? 1 : mp_plain_flush.next(ch, 0);
}

const struct mp_flush_ops mp_batched_flush = { .queued = batched_queued, .next = batched_next };
