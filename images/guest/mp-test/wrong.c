// SPDX-License-Identifier: GPL-2.0
/* Wrong calls through the library, and bad memory. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "test.h"

/* --- wrong calls through the library -------------------------------------------------- */

static void test_wrong_handle(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	int bad[] = { -1, 1, 63, 64, 1 << 20, INT32_MAX, INT32_MIN, p.handle };
	char buffer[8];

	EXPECT(mp_unregister(ch, p.handle), 0);
	NOTHING(ch);
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		EXPECT(mp_read(ch, bad[i], buffer, 1), -EBADF);
		EXPECT(mp_write(ch, bad[i], buffer, 1), -EBADF);
		EXPECT(mp_writev(ch, bad[i], NULL, 0), -EBADF);
		EXPECT(mp_accept(ch, bad[i], 1, false), -EBADF);
		EXPECT(mp_disconnect(ch, bad[i]), -EBADF);
		EXPECT(mp_unregister(ch, bad[i]), -EBADF);
	}
	/* On the way out counts as out. */
	p.handle = add(ch, p.mine);
	EXPECT(mp_unregister(ch, p.handle), 0);
	EXPECT(mp_unregister(ch, p.handle), -EBADF);
	EXPECT(mp_read(ch, p.handle, buffer, 1), -EBADF);
	NOTHING(ch);
	still_works(ch);
	mp_close(ch);
	end_pair(&p);
}

static void test_wrong_descriptor(void)
{
	struct mp_channel *ch = channel();
	struct raw r = raw_channel(1, 1);
	int closed = tcp_socket(), path = MUST(open("/", O_PATH));
	const struct {
		int fd;
		int result;
	} bad[] = {
		{ -1, -EBADF },
		{ INT32_MIN, -EBADF },
		{ INT32_MAX, -EBADF },
		{ closed, -EBADF },
		{ path, -EBADF },
		{ MP_LWSOCKET_BASE, -EBADF },
		{ MUST(socket(AF_NETLINK, SOCK_RAW, 0)), -EOPNOTSUPP },
		{ MUST(socket(AF_INET, SOCK_STREAM, 0x106 /* MPTCP */)), -EOPNOTSUPP },
		{ MUST(open("/", O_RDONLY)), -EOPNOTSUPP },
		{ MUST(open("/dev/null", O_RDWR)), -EOPNOTSUPP },
		{ MUST(epoll_create1(0)), -EOPNOTSUPP },
		{ r.fd, -EOPNOTSUPP },
		{ device(), -EOPNOTSUPP },
	};

	close(closed);
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		char buffer[1];
		int handle = add(ch, bad[i].fd);

		EXPECT(mp_read(ch, handle, buffer, 1), 0);
		WANT(ch, handle, MP_OP_REGISTER, bad[i].result);
		WANT(ch, handle, MP_OP_READ, -ENOENT);
		EXPECT(mp_unregister(ch, handle), 0);
		NOTHING(ch);
	}
	still_works(ch);
	mp_close(ch);
}

/* The channel has the connection, not the descriptor's number. */
static void test_closed_after(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	char buffer[8];

	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	EXPECT(mp_flush(ch), 0);
	close(p.mine);
	MUST(dup2(0, p.mine));
	peer_sends(&p, "data");
	WANT(ch, p.handle, MP_OP_READ, 4);
	EXPECT(mp_write(ch, p.handle, "back", 4), 0);
	WANT(ch, p.handle, MP_OP_WRITE, 4);
	peer_gets(&p, "back");
	peer_sees_life(p.peer);
	EXPECT(mp_unregister(ch, p.handle), 0);
	NOTHING(ch);
	peer_sees_end(p.peer);
	/* The same at the end of a channel. */
	close(p.peer);
	close(p.mine);
	p = added_pair(ch, 0);
	EXPECT(mp_flush(ch), 0);
	close(p.mine);
	peer_sees_life(p.peer);
	mp_close(ch);
	peer_sees_end(p.peer);
	close(p.peer);
}

static void test_twice(void)
{
	struct mp_channel *ch = channel(), *other = channel();
	struct pair p = added_pair(ch, 0);
	int again = add(ch, p.mine), elsewhere = add(other, p.mine);
	char buffer[3] = "";
	struct mp_event e;
	int got = 0;

	/* Three readers of one stream: each byte goes to one of them. */
	TRUE(again != p.handle);
	EXPECT(mp_read(ch, p.handle, &buffer[0], 1), 0);
	EXPECT(mp_read(ch, again, &buffer[1], 1), 0);
	EXPECT(mp_read(other, elsewhere, &buffer[2], 1), 0);
	EXPECT(mp_flush(ch), 0);
	EXPECT(mp_flush(other), 0);
	peer_sends(&p, "a");
	while (!got) {
		got += may_come(ch, &e, NEVER);
		got += may_come(other, &e, 0);
	}
	EXPECT(got, 1);
	peer_sends(&p, "bc");
	while (got < 3) {
		got += may_come(ch, &e, NEVER);
		got += may_come(other, &e, 0);
	}
	EXPECT(buffer[0] + buffer[1] + buffer[2], 'a' + 'b' + 'c');
	NOTHING(ch);
	NOTHING(other);
	mp_close(ch);
	mp_close(other);
	end_pair(&p);
}

static void test_busy(void)
{
	enum { SIZE = 200000, BUFFERS = 8192 };
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, BUFFERS);
	int listener = listening(), handle = add(ch, listener), peer;
	char *data = make_pattern(SIZE), buffer[2] = "";
	struct slow_reader reader = { p.peer, SIZE };
	struct iovec part = { data, 1 };
	struct mp_event e;
	pthread_t thread;

	EXPECT(mp_read(ch, p.handle, &buffer[0], 1), 0);
	EXPECT(mp_read(ch, p.handle, &buffer[1], 1), 0);
	WANT(ch, p.handle, MP_OP_READ, -EBUSY);
	EXPECT(mp_write(ch, p.handle, data, SIZE), 0);
	EXPECT(mp_write(ch, p.handle, "no", 2), 0);
	WANT(ch, p.handle, MP_OP_WRITE, -EBUSY);
	EXPECT(mp_writev(ch, p.handle, &part, 1), 0);
	WANT(ch, p.handle, MP_OP_WRITEV, -EBUSY);
	EXPECT(mp_accept(ch, handle, 1, false), 0);
	EXPECT(mp_accept(ch, handle, 1, false), 0);
	WANT(ch, handle, MP_OP_ACCEPT, -EBUSY);
	NOTHING(ch);
	/* The first ones have not suffered. */
	peer_sends(&p, "x");
	WANT(ch, p.handle, MP_OP_READ, 1);
	EXPECT(buffer[0], 'x');
	EXPECT(buffer[1], 0);
	peer = connected(listener);
	e = next(ch);
	TRUE(e.op == MP_OP_ACCEPT && e.result >= 0 && !e.more);
	close(e.result);
	close(peer);
	thread = start(read_slowly, &reader);
	WANT(ch, p.handle, MP_OP_WRITE, SIZE);
	join(thread);
	NOTHING(ch);
	mp_close(ch);
	end_pair(&p);
	close(listener);
	free(data);
}

static void test_wrong_use(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	int listener = listening(), handle = add(ch, listener);
	struct iovec part = { "x", 1 };
	char buffer[1];

	EXPECT(mp_read(ch, p.handle, buffer, 0), 0);
	WANT(ch, p.handle, MP_OP_READ, -EINVAL);
	EXPECT(mp_accept(ch, handle, 0, false), 0);
	WANT(ch, handle, MP_OP_ACCEPT, -EINVAL);
	EXPECT(mp_accept(ch, p.handle, 1, false), 0);
	WANT(ch, p.handle, MP_OP_ACCEPT, -EINVAL);
	EXPECT(mp_read(ch, handle, buffer, 1), 0);
	WANT(ch, handle, MP_OP_READ, -EINVAL);
	EXPECT(mp_write(ch, handle, buffer, 1), 0);
	WANT(ch, handle, MP_OP_WRITE, -EINVAL);
	EXPECT(mp_writev(ch, handle, &part, 1), 0);
	WANT(ch, handle, MP_OP_WRITEV, -EINVAL);
	NOTHING(ch);
	still_works(ch);
	mp_close(ch);
	end_pair(&p);
	close(listener);
}

/* --- bad memory ------------------------------------------------------------------------ */

static void test_bad_buffer(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	char *page = half_page(PROT_NONE), *constant = half_page(PROT_READ) + 4096;
	void *const unreadable[] = { NULL, NO_ADDRESS, KERNEL_ADDRESS, (void *)UINTPTR_MAX,
				     page + 4096 };
	struct mp_event e;
	char buffer[16];

	for (size_t i = 0; i < sizeof(unreadable) / sizeof(*unreadable); i++) {
		EXPECT(mp_write(ch, p.handle, unreadable[i], 10), 0);
		WANT(ch, p.handle, MP_OP_WRITE, -EFAULT);
		EXPECT(mp_write(ch, p.handle, unreadable[i], UINT32_MAX), 0);
		WANT(ch, p.handle, MP_OP_WRITE, -EFAULT);
		/* Ready, and pending. */
		peer_sends(&p, "data");
		EXPECT(mp_read(ch, p.handle, unreadable[i], 10), 0);
		WANT(ch, p.handle, MP_OP_READ, -EFAULT);
		EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
		WANT(ch, p.handle, MP_OP_READ, 4);
		EXPECT(mp_read(ch, p.handle, unreadable[i], 10), 0);
		if (!may_come(ch, &e, NEVER)) {
			peer_sends(&p, "data");
			e = next(ch);
			EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
			WANT(ch, p.handle, MP_OP_READ, 4);
		}
		EXPECT(e.op, MP_OP_READ);
		EXPECT(e.result, -EFAULT);
	}
	peer_sends(&p, "data");
	EXPECT(mp_read(ch, p.handle, constant, 10), 0);
	WANT(ch, p.handle, MP_OP_READ, -EFAULT);
	EXPECT(mp_write(ch, p.handle, constant, 10), 0);
	WANT(ch, p.handle, MP_OP_WRITE, 10);
	/* The bytes are still there. */
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	WANT(ch, p.handle, MP_OP_READ, 4);
	/* The first bytes are all right. */
	EXPECT(mp_write(ch, p.handle, page + 4090, 1000), 0);
	e = next(ch);
	EXPECT(e.op, MP_OP_WRITE);
	if (e.result != -EFAULT && !(e.result >= 0 && e.result <= 6 && e.error == -EFAULT))
		fail("expected -EFAULT, at once or after 6 bytes, came %s and %s",
		     show(e.result), show(e.error));
	NOTHING(ch);
	still_works(ch);
	mp_close(ch);
	end_pair(&p);
}

static void test_bad_iovec(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	char *page = half_page(PROT_NONE);
	struct iovec *last = (struct iovec *)(page + 4096) - 1;
	struct iovec bad[] = { { "12345", 5 }, { NO_ADDRESS, 5 } };
	struct iovec kernel[] = { { "12345", 5 }, { KERNEL_ADDRESS, 5 } };
	struct iovec negative[] = { { "12345", SIZE_MAX }, { "1", 1 } };
	static struct iovec many[1025];
	char buffer[16];
	struct mp_event e;

	*last = (struct iovec){ "x", 1 };
	for (int i = 0; i < 1025; i++)
		many[i] = *last;
	const struct {
		const struct iovec *parts;
		unsigned int count;
		int result;
	} cases[] = {
		{ many, 1025, -EINVAL },
		{ many, UINT32_MAX, -EINVAL },
		{ NULL, 1, -EFAULT },
		{ NULL, 2, -EFAULT },
		{ KERNEL_ADDRESS, 1, -EFAULT },
		{ KERNEL_ADDRESS, 3, -EFAULT },
		{ last, 2, -EFAULT },
		{ &bad[1], 1, -EFAULT },
		{ &kernel[1], 1, -EFAULT },
		{ kernel, 2, -EFAULT },
		{ last, 1, 1 },
		{ many, 1024, 1024 },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		EXPECT(mp_writev(ch, p.handle, cases[i].parts, cases[i].count), 0);
		WANT(ch, p.handle, MP_OP_WRITEV, cases[i].result);
	}
	for (int count = 1; count <= 2; count++) {
		EXPECT(mp_writev(ch, p.handle, negative, count), 0);
		e = next(ch);
		TRUE(e.op == MP_OP_WRITEV);
		if (e.result != -EINVAL && e.result != -EFAULT)
			fail("expected -EINVAL or -EFAULT, came %s", show(e.result));
	}
	for (int i = 0; i < 1025; i++)
		EXPECT(recv(p.peer, buffer, 1, 0), 1);
	peer_sees_life(p.peer);
	EXPECT(mp_writev(ch, p.handle, bad, 2), 0);
	e = next(ch);
	EXPECT(e.op, MP_OP_WRITEV);
	if (e.result != -EFAULT && !(e.result == 5 && e.error == -EFAULT))
		fail("expected -EFAULT, at once or after 5 bytes, came %s and %s",
		     show(e.result), show(e.error));
	NOTHING(ch);
	still_works(ch);
	mp_close(ch);
	end_pair(&p);
}

static void test_unmapped_while_pending(void)
{
	enum { SIZE = 1 << 20, BUFFERS = 8192 };
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, BUFFERS);
	char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			    -1, 0);
	char buffer[4096];
	struct mp_event e;
	int events = 0;

	TRUE(memory != MAP_FAILED);
	EXPECT(mp_read(ch, p.handle, memory, 100), 0);
	EXPECT(mp_write(ch, p.handle, memory, SIZE), 0);
	NOTHING(ch);
	MUST(munmap(memory, SIZE));
	peer_sends(&p, "data");
	while (events < 2) {
		if (!may_come(ch, &e, 0)) {
			TRUE(recv(p.peer, buffer, sizeof(buffer), 0) > 0);
			continue;
		}
		events++;
		if (e.op == MP_OP_READ) {
			EXPECT(e.result, -EFAULT);
			continue;
		}
		EXPECT(e.op, MP_OP_WRITE);
		TRUE(e.result > 0 && e.result < SIZE);
		EXPECT(e.error, -EFAULT);
	}
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	WANT(ch, p.handle, MP_OP_READ, 4);
	still_works(ch);
	mp_close(ch);
	end_pair(&p);
}

const struct test_case wrong_cases[] = {
	{ "wrong-handle", test_wrong_handle },
	{ "wrong-descriptor", test_wrong_descriptor },
	{ "closed-after", test_closed_after },
	{ "twice", test_twice },
	{ "busy", test_busy },
	{ "wrong-use", test_wrong_use },
	{ "bad-buffer", test_bad_buffer },
	{ "bad-iovec", test_bad_iovec },
	{ "unmapped-while-pending", test_unmapped_while_pending },
	{ }
};
