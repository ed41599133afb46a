// SPDX-License-Identifier: GPL-2.0
/* Rings that are small, and full. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "test.h"

static void tiny(unsigned int requests, unsigned int completions, int count)
{
	struct mp_channel *ch = channel_of(requests, completions);
	struct pair *p = calloc(count, sizeof(*p));
	char *buffer = calloc(count, 1);
	int listener = listening(), handle = add(ch, listener);
	int events, high = 0;

	TRUE(p && buffer);
	EXPECT(mp_accept(ch, handle, count, false), 0);
	for (int i = 0; i < count; i++)
		p[i].peer = connected(listener);
	for (int i = 0; i < count; i++) {
		struct mp_event e = next(ch);

		TRUE(e.op == MP_OP_ACCEPT && e.result >= 0);
		EXPECT(e.more, i < count - 1);
		p[i].mine = e.result;
	}
	for (int i = 0; i < count; i++) {
		p[i].handle = add(ch, p[i].mine);
		if (p[i].handle > high)
			high = p[i].handle;
		EXPECT(mp_read(ch, p[i].handle, &buffer[i], 1), 0);
	}
	TRUE(high <= count);
	/* Accepted in another order than connected, so whose is whose? Nobody minds. */
	for (int i = 0; i < count; i++)
		EXPECT(send(p[i].peer, "x", 1, MSG_NOSIGNAL), 1);
	for (events = 0; events < 2 * count; events++) {
		struct mp_event e = next(ch);
		int i = e.handle - 1;

		TRUE(i >= 0 && i < count && p[i].handle == e.handle);
		EXPECT(e.result, 1);
		if (e.op == MP_OP_READ)
			EXPECT(mp_write(ch, e.handle, &buffer[i], 1), 0);
	}
	for (int i = 0; i < count; i++) {
		char byte = 0;

		EXPECT(recv(p[i].peer, &byte, 1, 0), 1);
		EXPECT(byte, 'x');
	}
	for (int i = 0; i < count; i++)
		EXPECT(mp_unregister(ch, p[i].handle), 0);
	EXPECT(mp_unregister(ch, handle), 0);
	NOTHING(ch);
	/* Every number is free again. */
	TRUE(add(ch, p[0].mine) <= count);
	mp_close(ch);
	for (int i = 0; i < count; i++)
		end_pair(&p[i]);
	close(listener);
	free(p);
	free(buffer);
}

static void test_tiny_rings(void)
{
	tiny(1, 1, 100);
	tiny(1, 2, 60);
	tiny(2, 1, 60);
	tiny(4, 4, 60);
	tiny(64, 1, 100);
	tiny(1, 64, 100);
}

/*
 * Requests that had to stay behind a full ring of completions go down by
 * themselves, all of them, before the thread sleeps.
 */
static void test_held_back(void)
{
	enum { QUIET = 4 };
	struct mp_channel *ch = channel_of(64, 2);
	struct pair full[2], quiet[QUIET], p = added_pair(ch, 0);
	static char buffer[QUIET + 3];

	for (int i = 0; i < 2; i++) {
		full[i] = added_pair(ch, 0);
		peer_sends(&full[i], "x");
		EXPECT(mp_read(ch, full[i].handle, &buffer[i], 1), 0);
	}
	for (int i = 0; i < QUIET; i++)
		quiet[i] = added_pair(ch, 0);
	EXPECT(mp_flush(ch), -EAGAIN);
	for (int i = 0; i < QUIET; i++)
		EXPECT(mp_read(ch, quiet[i].handle, &buffer[i], 1), 0);
	peer_sends(&p, "x");
	EXPECT(mp_read(ch, p.handle, &buffer[QUIET + 2], 1), 0);
	WANT(ch, full[0].handle, MP_OP_READ, 1);
	WANT(ch, full[1].handle, MP_OP_READ, 1);
	WANT(ch, p.handle, MP_OP_READ, 1);
	NOTHING(ch);
	EXPECT(mp_flush(ch), 0);
	mp_close(ch);
	for (int i = 0; i < 2; i++)
		end_pair(&full[i]);
	for (int i = 0; i < QUIET; i++)
		end_pair(&quiet[i]);
	end_pair(&p);
}

static void test_full_rings(void)
{
	struct raw r = raw_channel(4, 1);
	struct pair p = tcp_pair(0), q = tcp_pair(0);
	static char buffer[2];
	struct mp_request read = { .op = MP_OP_READ, .addr = (uintptr_t)buffer, .len = 1 };
	struct mp_completion c;

	raw_register(&r, 0, p.mine);
	raw_register(&r, 1, q.mine);
	read.handle = 0;
	raw_begin(&r, read);
	read.handle = 1;
	raw_begin(&r, read);
	peer_sends(&p, "p");
	peer_sends(&q, "q");
	EXPECT(raw_wait(&r, 0, -1), 0);
	EXPECT(raw_waiting(&r), 1);
	/* No room: nothing is taken, nothing is lost, and nobody sleeps. */
	raw_put(&r, (struct mp_request){ .op = MP_OP_UNREGISTER, .handle = 7 });
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 0);
	EXPECT(raw_wait(&r, MP_ENTER_SUBMIT, -1), 0);
	EXPECT(r.shared->sq_head, r.sq_tail - 1);
	for (int i = 0; i < 2; i++) {
		EXPECT(raw_wait(&r, 0, -1), 0);
		EXPECT(raw_waiting(&r), 1);
		c = raw_take(&r);
		EXPECT(c.op, MP_OP_READ);
		EXPECT(c.result, 1);
	}
	EXPECT(raw_wait(&r, MP_ENTER_SUBMIT, -1), 1);
	EXPECT(raw_take(&r).result, -ENOENT);
	raw_close(&r);
	end_pair(&p);
	end_pair(&q);
}

const struct test_case rings_cases[] = {
	{ "tiny-rings", test_tiny_rings },
	{ "held-back", test_held_back },
	{ "full-rings", test_full_rings },
	{ }
};
