// SPDX-License-Identifier: GPL-2.0
/* Several channels at one listener. */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "test.h"

static void test_emfile(void)
{
	struct mp_channel *ch = channel();
	int listener = listening(), handle = add(ch, listener);
	int peer = connected(listener);
	struct rlimit limit, small;
	struct mp_event e;

	wait_backlog(listener, 1);
	MUST(getrlimit(RLIMIT_NOFILE, &limit));
	small = limit;
	small.rlim_cur = 3;
	EXPECT(mp_flush(ch), 0);
	MUST(setrlimit(RLIMIT_NOFILE, &small));
	EXPECT(mp_accept(ch, handle, 10, false), 0);
	EXPECT(WANT(ch, handle, MP_OP_ACCEPT, -EMFILE).more, false);
	NOTHING(ch);
	MUST(setrlimit(RLIMIT_NOFILE, &limit));
	/* The connection has waited. */
	EXPECT(backlog(listener), 1);
	EXPECT(mp_accept(ch, handle, 1, false), 0);
	e = next(ch);
	TRUE(e.op == MP_OP_ACCEPT && e.result >= 0);
	close(e.result);
	/* Pending when it strikes. */
	close(peer);
	EXPECT(mp_accept(ch, handle, 10, false), 0);
	NOTHING(ch);
	peer = connected(listener);
	MUST(setrlimit(RLIMIT_NOFILE, &small));
	WANT(ch, handle, MP_OP_ACCEPT, -EMFILE);
	MUST(setrlimit(RLIMIT_NOFILE, &limit));
	mp_close(ch);
	close(peer);
	close(listener);
}

/* Handles keep files open, so a channel holds no more than there may be descriptors. */
static void test_handle_limit(void)
{
	struct mp_channel *ch = channel();
	int listener = listening(), handle, last = -1;
	struct rlimit limit, small;

	MUST(getrlimit(RLIMIT_NOFILE, &limit));
	small = limit;
	small.rlim_cur = 16;
	MUST(setrlimit(RLIMIT_NOFILE, &small));
	for (int i = 0; i < 16; i++)
		last = add(ch, listener);
	handle = add(ch, listener);
	EXPECT(mp_flush(ch), 0);
	WANT(ch, handle, MP_OP_REGISTER, -EMFILE);
	EXPECT(mp_unregister(ch, handle), 0);
	EXPECT(mp_unregister(ch, last), 0);
	add(ch, listener);
	EXPECT(mp_flush(ch), 0);
	NOTHING(ch);
	MUST(setrlimit(RLIMIT_NOFILE, &limit));
	mp_close(ch);
	close(listener);
}

/*
 * Two channels wait; a connection comes, and one of them is told. That one does
 * something else: the connection must go to the other one.
 */
static void test_hand_on(void)
{
	enum { UNREGISTER, CLOSE, FULL, ENOUGH, WAYS };

	for (int way = 0; way < WAYS; way++) {
		int listener = listening(), peers[3];
		struct raw r[2] = { raw_channel(8, 8), raw_channel(8, 8) };
		struct mp_request accept = { .op = MP_OP_ACCEPT, .len = 1 };
		struct rlimit limit, small;
		struct mp_completion c;

		raw_register(&r[0], 0, listener);
		raw_register(&r[1], 0, listener);
		raw_begin(&r[0], accept);
		raw_begin(&r[1], accept);
		peers[0] = connected(listener);
		switch (way) {
		case UNREGISTER:
			c = raw_do(&r[0], (struct mp_request){ .op = MP_OP_UNREGISTER });
			EXPECT(c.result, 0);
			break;
		case CLOSE:
			raw_close(&r[0]);
			break;
		case FULL:
			MUST(getrlimit(RLIMIT_NOFILE, &limit));
			small = limit;
			small.rlim_cur = 3;
			MUST(setrlimit(RLIMIT_NOFILE, &small));
			EXPECT(raw_next(&r[0]).result, -EMFILE);
			MUST(setrlimit(RLIMIT_NOFILE, &limit));
			break;
		case ENOUGH:
			/* One for each, though the first is told first of both. */
			peers[1] = connected(listener);
			wait_backlog(listener, 2);
			c = raw_next(&r[0]);
			TRUE(c.result >= 0);
			close(c.result);
			EXPECT(c.queued, 1);
			break;
		}
		c = raw_next(&r[1]);
		EXPECT(c.op, MP_OP_ACCEPT);
		TRUE(c.result >= 0);
		EXPECT(c.queued, 0);
		close(c.result);
		if (way == ENOUGH)
			close(peers[1]);
		close(peers[0]);
		if (way != CLOSE)
			raw_close(&r[0]);
		raw_close(&r[1]);
		close(listener);
	}
}

struct acceptors {
	int listener;
	atomic_int accepted;
	atomic_bool over;
};

static void *accept_some(void *argument)
{
	struct acceptors *all = argument;
	uint64_t seed = (uintptr_t)&seed ^ now_ns();
	struct raw r = raw_channel(8, 8);
	struct mp_request accept = { .op = MP_OP_ACCEPT };
	bool in = false, waits = false;

	while (!atomic_load(&all->over)) {
		if (!in) {
			raw_put(&r, (struct mp_request){
				.op = MP_OP_REGISTER, .fd = all->listener });
			EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 1);
			in = true;
		}
		if (!waits) {
			accept.len = 1 + random_next(&seed) % 3;
			raw_put(&r, accept);
			EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 1);
			waits = true;
		}
		if (random_next(&seed) % 4) {
			EXPECT(raw_wait(&r, 0, random_next(&seed) % 5000000), 0);
		} else {
			/* Go away, woken or not; what has been accepted is accepted. */
			raw_put(&r, (struct mp_request){ .op = MP_OP_UNREGISTER });
			EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 1);
		}
		while (raw_waiting(&r)) {
			struct mp_completion c = raw_take(&r);

			if (c.op == MP_OP_UNREGISTER) {
				EXPECT(c.result, 0);
				in = waits = false;
				continue;
			}
			EXPECT(c.op, MP_OP_ACCEPT);
			if (c.result < 0)
				fail("expected a connection, came %s", show(c.result));
			waits = c.flags & MP_MORE;
			atomic_fetch_add(&all->accepted, 1);
			EXPECT(write(c.result, "A", 1), 1);
			close_politely(c.result);
		}
	}
	raw_close(&r);
	return NULL;
}

static void test_shared_listener(void)
{
	enum { THREADS = 3, ROUNDS = 40, AT_ONCE = 3 };
	struct acceptors all = { .listener = listening() };
	struct timeval limit = { SOON / 1000, 0 };
	pthread_t threads[THREADS];

	for (int i = 0; i < THREADS; i++)
		threads[i] = start(accept_some, &all);
	for (int i = 0; i < ROUNDS * scale; i++) {
		int peers[AT_ONCE];

		for (int j = 0; j < AT_ONCE; j++) {
			peers[j] = connected(all.listener);
			MUST(setsockopt(peers[j], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)));
		}
		for (int j = 0; j < AT_ONCE; j++) {
			char byte[2];

			if (recv(peers[j], byte, 1, 0) != 1)
				fail("round %d: connection %d was never accepted", i, j);
			EXPECT(recv(peers[j], byte, 2, 0), 0);
			close(peers[j]);
		}
	}
	EXPECT(atomic_load(&all.accepted), ROUNDS * scale * AT_ONCE);
	atomic_store(&all.over, true);
	for (int i = 0; i < THREADS; i++)
		join(threads[i]);
	close(all.listener);
}

const struct test_case listeners_cases[] = {
	{ "emfile", test_emfile },
	{ "handle-limit", test_handle_limit },
	{ "hand-on", test_hand_on },
	{ "shared-listener", test_shared_listener },
	{ }
};
