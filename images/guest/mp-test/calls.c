// SPDX-License-Identifier: GPL-2.0
/* Every call, used as intended. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/net_tstamp.h>
#include <linux/tls.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

#include "test.h"

static void test_create(void)
{
	const unsigned int bad[] = { 3, 100, 65535, 65536, 1U << 31, UINT32_MAX };
	struct mp_channel *ch = mp_create(NULL);
	int before;

	TRUE(ch);
	mp_close(ch);
	mp_close(NULL);
	before = open_descriptors();
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		TRUE(!mp_create(&(struct mp_options){ .requests = bad[i] }));
		EXPECT(errno, EINVAL);
		TRUE(!mp_create(&(struct mp_options){ .completions = bad[i] }));
		EXPECT(errno, EINVAL);
	}
	TRUE(!mp_create(&(struct mp_options){ .flags = 1U << 31 }));
	EXPECT(errno, EINVAL);
	EXPECT(open_descriptors(), before);
	ch = channel_of(MP_MAX_ENTRIES, MP_MAX_ENTRIES);
	still_works(ch);
	mp_close(ch);
	EXPECT(open_descriptors(), before);
}

static void test_echo(void)
{
	struct mp_channel *ch = channel();

	still_works(ch);
	mp_close(ch);
}

static void test_accept_many(void)
{
	enum { COUNT = 20, FIRST = 15 };
	int listener = listening(), peers[COUNT], before;
	struct mp_channel *ch = channel();
	struct mp_event e;
	int handle = mp_register(ch, listener, &listener, NULL, 0);

	for (int i = 0; i < COUNT; i++)
		peers[i] = connected(listener);
	wait_backlog(listener, COUNT);
	EXPECT(mp_accept(ch, handle, FIRST, false), 0);
	for (int i = 0; i < FIRST; i++) {
		e = next(ch);
		EXPECT(e.op, MP_OP_ACCEPT);
		EXPECT(e.handle, handle);
		TRUE(e.cookie == &listener);
		TRUE(e.result >= 0);
		EXPECT(e.queued, COUNT - 1 - i);
		EXPECT(e.more, i < FIRST - 1);
		EXPECT(fcntl(e.result, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
		EXPECT(fcntl(e.result, F_GETFL) & O_NONBLOCK, O_NONBLOCK);
		EXPECT(write(e.result, "x", 1), 1);
		EXPECT(port_of(e.result), port_of(listener));
		MUST(close(e.result));
	}
	NOTHING(ch);
	wait_backlog(listener, COUNT - FIRST);
	EXPECT(mp_accept(ch, handle, 1000, false), 0);
	for (int i = FIRST; i < COUNT; i++) {
		e = next(ch);
		TRUE(e.result >= 0 && e.more);
		EXPECT(e.queued, COUNT - 1 - i);
		EXPECT(write(e.result, "x", 1), 1);
		MUST(close(e.result));
	}
	for (int i = 0; i < COUNT; i++) {
		char byte = 0;

		EXPECT(read(peers[i], &byte, 1), 1);
		EXPECT(byte, 'x');
		close(peers[i]);
	}
	NOTHING(ch);
	/* Events that nobody takes take their descriptors along. */
	before = open_descriptors();
	for (int i = 0; i < COUNT; i++)
		peers[i] = connected(listener);
	wait_backlog(listener, COUNT);
	e = next(ch);
	close(e.result);
	mp_close(ch);
	for (int i = 0; i < COUNT; i++)
		close(peers[i]);
	EXPECT(open_descriptors(), before - 1);
}

static void test_accept_waits(void)
{
	int listener = listening(), peer;
	struct mp_channel *ch = channel();
	int handle = add(ch, listener);
	struct mp_event e;

	EXPECT(mp_accept(ch, handle, 2, false), 0);
	NOTHING(ch);
	for (int i = 0; i < 2; i++) {
		peer = connected(listener);
		e = next(ch);
		TRUE(e.op == MP_OP_ACCEPT && e.result >= 0);
		EXPECT(e.more, i == 0);
		close(e.result);
		close(peer);
	}
	NOTHING(ch);
	mp_close(ch);
	close(listener);
}

static void test_listen_late(void)
{
	int fd = bound(tcp_socket()), peer;
	struct mp_channel *ch = channel();
	int handle = add(ch, fd);
	struct mp_event e;

	EXPECT(mp_accept(ch, handle, 1, false), 0);
	WANT(ch, handle, MP_OP_ACCEPT, -EINVAL);
	MUST(listen(fd, 8));
	EXPECT(mp_accept(ch, handle, 1, false), 0);
	NOTHING(ch);
	peer = connected(fd);
	e = next(ch);
	TRUE(e.op == MP_OP_ACCEPT && e.result >= 0);
	close(e.result);
	close(peer);
	/* A listener that stops to listen ends what waits for it. */
	EXPECT(mp_accept(ch, handle, 1, false), 0);
	NOTHING(ch);
	MUST(shutdown(fd, SHUT_RDWR));
	WANT(ch, handle, MP_OP_ACCEPT, -EINVAL);
	EXPECT(mp_unregister(ch, handle), 0);
	NOTHING(ch);
	mp_close(ch);
	close(fd);
}

static void test_read(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	/* Not on the stack, which may end less than 2 GiB below the end of all addresses. */
	static char buffer[16];

	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	peer_sends(&p, "hello");
	WANT(ch, p.handle, MP_OP_READ, 5);
	TRUE(!memcmp(buffer, "hello", 5));
	/* Data first, then the read; and no more than was asked for. */
	peer_sends(&p, "0123456789");
	EXPECT(mp_read(ch, p.handle, buffer, 4), 0);
	WANT(ch, p.handle, MP_OP_READ, 4);
	TRUE(!memcmp(buffer, "0123o", 5));
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	WANT(ch, p.handle, MP_OP_READ, 6);
	TRUE(!memcmp(buffer, "456789", 6));
	/* As large as a size can be: there is only so much. */
	peer_sends(&p, "end");
	EXPECT(mp_read(ch, p.handle, buffer, SIZE_MAX), 0);
	WANT(ch, p.handle, MP_OP_READ, 3);
	NOTHING(ch);
	mp_close(ch);
	end_pair(&p);
}

static void test_read_eof(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	char buffer[16];

	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	MUST(shutdown(p.peer, SHUT_WR));
	WANT(ch, p.handle, MP_OP_READ, 0);
	/* Again and again; and the other direction is open. */
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	WANT(ch, p.handle, MP_OP_READ, 0);
	EXPECT(mp_write(ch, p.handle, "still", 5), 0);
	WANT(ch, p.handle, MP_OP_WRITE, 5);
	peer_gets(&p, "still");
	mp_close(ch);
	end_pair(&p);
}

static void test_reset(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0), q;
	char buffer[16];

	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	close(p.peer);
	WANT(ch, p.handle, MP_OP_READ, -ECONNRESET);
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	WANT(ch, p.handle, MP_OP_READ, 0);
	EXPECT(mp_write(ch, p.handle, buffer, 1), 0);
	WANT(ch, p.handle, MP_OP_WRITE, -EPIPE);
	/* After a FIN it is the end of the stream, as recv() has it, and no error. */
	q = added_pair(ch, 0);
	MUST(shutdown(q.peer, SHUT_WR));
	close(q.peer);
	for (int i = 0; i < 2; i++) {
		EXPECT(mp_read(ch, q.handle, buffer, sizeof(buffer)), 0);
		WANT(ch, q.handle, MP_OP_READ, 0);
	}
	mp_close(ch);
	close(p.mine);
	close(q.mine);
}

static void test_write(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);

	EXPECT(mp_write(ch, p.handle, "hello", 5), 0);
	EXPECT(WANT(ch, p.handle, MP_OP_WRITE, 5).error, 0);
	peer_gets(&p, "hello");
	EXPECT(mp_write(ch, p.handle, NULL, 0), 0);
	EXPECT(WANT(ch, p.handle, MP_OP_WRITE, 0).error, 0);
	MUST(shutdown(p.mine, SHUT_WR));
	EXPECT(mp_write(ch, p.handle, "x", 1), 0);
	WANT(ch, p.handle, MP_OP_WRITE, -EPIPE);
	mp_close(ch);
	end_pair(&p);
}

static void test_write_large(void)
{
	enum { SIZE = 400000, BUFFERS = 8192 };
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, BUFFERS);
	char *data = make_pattern(SIZE), buffer[8];
	struct slow_reader reader = { p.peer, SIZE };
	struct mp_event e;
	pthread_t thread;

	EXPECT(mp_write(ch, p.handle, data, SIZE), 0);
	NOTHING(ch);
	thread = start(read_slowly, &reader);
	/* A read works on beside it. */
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	peer_sends(&p, "both");
	for (int got = 0; got < 2; got++) {
		e = next(ch);
		if (e.op == MP_OP_READ) {
			EXPECT(e.result, 4);
		} else {
			EXPECT(e.op, MP_OP_WRITE);
			EXPECT(e.result, SIZE);
			EXPECT(e.error, 0);
		}
	}
	NOTHING(ch);
	join(thread);
	mp_close(ch);
	end_pair(&p);
	free(data);
}

static void test_write_cut(void)
{
	enum { SIZE = 400000, BUFFERS = 8192 };
	char *data = make_pattern(SIZE);

	for (int polite = 0; polite < 2; polite++) {
		struct mp_channel *ch = channel();
		struct pair p = added_pair(ch, BUFFERS);
		char buffer[1000];
		struct mp_event e;

		EXPECT(mp_write(ch, p.handle, data, SIZE), 0);
		NOTHING(ch);
		EXPECT(recv(p.peer, buffer, sizeof(buffer), MSG_WAITALL), sizeof(buffer));
		NOTHING(ch);
		/* Unread bytes: even a polite end resets. */
		if (polite)
			close_politely(p.peer);
		else
			close(p.peer);
		e = next(ch);
		EXPECT(e.op, MP_OP_WRITE);
		TRUE(e.result > 0 && e.result < SIZE);
		if (e.error != -ECONNRESET && e.error != -EPIPE)
			fail("expected -ECONNRESET or -EPIPE in error, came %s", show(e.error));
		NOTHING(ch);
		mp_close(ch);
		close(p.mine);
	}
	free(data);
}

static void test_writev(void)
{
	enum { SIZE = 300000, BUFFERS = 8192 };
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, BUFFERS);
	char *data = make_pattern(SIZE);
	struct slow_reader reader = { p.peer, SIZE };
	struct iovec parts[] = {
		{ "he", 2 }, { NULL, 0 }, { "l", 1 }, { "lo", 2 },
	}, many[1024];
	pthread_t thread;

	EXPECT(mp_writev(ch, p.handle, parts, 4), 0);
	WANT(ch, p.handle, MP_OP_WRITEV, 5);
	peer_gets(&p, "hello");
	EXPECT(mp_writev(ch, p.handle, parts, 1), 0);
	WANT(ch, p.handle, MP_OP_WRITEV, 2);
	peer_gets(&p, "he");
	EXPECT(mp_writev(ch, p.handle, parts, 0), 0);
	WANT(ch, p.handle, MP_OP_WRITEV, 0);
	EXPECT(mp_writev(ch, p.handle, NULL, 0), 0);
	WANT(ch, p.handle, MP_OP_WRITEV, 0);
	/* As many as there can be, of sizes that fit nowhere. */
	for (size_t i = 0, at = 0; i < 1024; i++) {
		size_t size = i < 1023 ? i * 7 % 293 : SIZE - at;

		many[i] = (struct iovec){ data + at, size };
		at += size;
	}
	EXPECT(mp_writev(ch, p.handle, many, 1024), 0);
	NOTHING(ch);
	/* The array has been read. */
	memset(many, 0xff, sizeof(many));
	thread = start(read_slowly, &reader);
	EXPECT(WANT(ch, p.handle, MP_OP_WRITEV, SIZE).error, 0);
	join(thread);
	/* Given up while it waits: the kernel's copy of the array goes with it. */
	many[0] = many[1] = (struct iovec){ data, SIZE };
	EXPECT(mp_writev(ch, p.handle, many, 2), 0);
	NOTHING(ch);
	EXPECT(mp_unregister(ch, p.handle), 0);
	NOTHING(ch);
	mp_close(ch);
	end_pair(&p);
	free(data);
}

static void test_disconnect(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	int listener = listening(), fresh = tcp_socket(), other = tcp_socket();
	char buffer[8];
	int handle;

	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	EXPECT(mp_disconnect(ch, p.handle), 0);
	WANT(ch, p.handle, MP_OP_DISCONNECT, 0);
	WANT(ch, p.handle, MP_OP_READ, 0);
	EXPECT(recv(p.peer, buffer, 1, 0), 0);
	/* It is neither freed nor unregistered. */
	EXPECT(mp_write(ch, p.handle, "x", 1), 0);
	WANT(ch, p.handle, MP_OP_WRITE, -EPIPE);
	TRUE(fcntl(p.mine, F_GETFD) >= 0);
	EXPECT(mp_unregister(ch, p.handle), 0);

	handle = add(ch, fresh);
	EXPECT(mp_disconnect(ch, handle), 0);
	WANT(ch, handle, MP_OP_DISCONNECT, -ENOTCONN);
	handle = add(ch, other);
	EXPECT(mp_read(ch, handle, buffer, 1), 0);
	WANT(ch, handle, MP_OP_READ, -ENOTCONN);
	EXPECT(mp_write(ch, handle, buffer, 1), 0);
	WANT(ch, handle, MP_OP_WRITE, -EPIPE);

	handle = add(ch, listener);
	EXPECT(mp_accept(ch, handle, 5, false), 0);
	NOTHING(ch);
	EXPECT(mp_disconnect(ch, handle), 0);
	WANT(ch, handle, MP_OP_DISCONNECT, 0);
	WANT(ch, handle, MP_OP_ACCEPT, -EINVAL);
	NOTHING(ch);
	mp_close(ch);
	end_pair(&p);
	close(listener);
	close(fresh);
	close(other);
}

static void test_unregister_drops(void)
{
	enum { WAITING = 3 };
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0), q = added_pair(ch, 0);
	int listener = listening(), peers[WAITING], before;
	char buffer[8];
	int handle;

	/* Pending. */
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	EXPECT(mp_unregister(ch, p.handle), 0);
	EXPECT(mp_flush(ch), 0);
	peer_sends(&p, "data");
	NOTHING(ch);
	/* The descriptor is as good as before. */
	EXPECT(recv(p.mine, buffer, sizeof(buffer), 0), 4);

	/* Ready, but not run: data came after the crossing. */
	EXPECT(mp_read(ch, q.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	peer_sends(&q, "data");
	EXPECT(mp_unregister(ch, q.handle), 0);
	NOTHING(ch);
	EXPECT(recv(q.mine, buffer, sizeof(buffer), 0), 4);

	/* Completed, but not dispatched; and what was accepted is closed. */
	handle = add(ch, listener);
	before = open_descriptors();
	for (int i = 0; i < WAITING; i++)
		peers[i] = connected(listener);
	wait_backlog(listener, WAITING);
	EXPECT(mp_accept(ch, handle, WAITING, false), 0);
	EXPECT(mp_flush(ch), 0);
	EXPECT(mp_unregister(ch, handle), 0);
	NOTHING(ch);
	EXPECT(open_descriptors(), before + WAITING);
	for (int i = 0; i < WAITING; i++) {
		peer_sees_end(peers[i]);
		close(peers[i]);
	}
	mp_close(ch);
	end_pair(&p);
	end_pair(&q);
	close(listener);
}

static void test_cookies(void)
{
	void *const cookies[] = { NULL, (void *)1, KERNEL_ADDRESS, (void *)UINTPTR_MAX };
	enum { COUNT = sizeof(cookies) / sizeof(*cookies) };
	struct mp_channel *ch = channel();
	struct pair p[COUNT];
	char buffer[COUNT];

	for (int i = 0; i < COUNT; i++) {
		p[i] = tcp_pair(0);
		p[i].handle = mp_register(ch, p[i].mine, cookies[i], NULL, 0);
		EXPECT(mp_read(ch, p[i].handle, &buffer[i], 1), 0);
	}
	NOTHING(ch);
	for (int i = COUNT - 1; i >= 0; i--) {
		peer_sends(&p[i], "x");
		TRUE(WANT(ch, p[i].handle, MP_OP_READ, 1).cookie == cookies[i]);
		end_pair(&p[i]);
	}
	/* Of a registration that failed, too. */
	p[0].handle = mp_register(ch, -1, &p, NULL, 0);
	TRUE(WANT(ch, p[0].handle, MP_OP_REGISTER, -EBADF).cookie == &p);
	mp_close(ch);
}

static void test_mask(void)
{
	struct mp_channel *ch = channel();
	int listener = listening(), handle, peer;
	struct pair p = tcp_pair(0);
	unsigned char every[2000], none[2000] = { 0 }, first = 1;
	struct mp_event e;

	memset(every, 0xff, sizeof(every));
	const struct {
		int fd;
		const void *mask;
		size_t bytes;
		int result;	/* 0: works */
	} cases[] = {
		{ listener, NULL, 0, 0 },
		{ listener, every, 1, 0 },
		{ listener, every, sizeof(every), 0 },
		{ listener, &first, 1, 0 },
		{ listener, none, 1, -EINVAL },
		{ listener, none, sizeof(none), -EINVAL },
		{ listener, every, 0, -EINVAL },
		{ listener, NULL, 8, -EFAULT },
		{ listener, NO_ADDRESS, 8, -EFAULT },
		{ listener, KERNEL_ADDRESS, 8, -EFAULT },
		{ listener, NO_ADDRESS, SIZE_MAX, -EFAULT },
		{ p.mine, every, 1, -EINVAL },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		handle = mp_register(ch, cases[i].fd, NULL, cases[i].mask, cases[i].bytes);
		TRUE(handle >= 0);
		if (cases[i].result) {
			WANT(ch, handle, MP_OP_REGISTER, cases[i].result);
		} else {
			EXPECT(mp_accept(ch, handle, 1, false), 0);
			NOTHING(ch);
			peer = connected(listener);
			e = next(ch);
			TRUE(e.op == MP_OP_ACCEPT && e.result >= 0);
			close(e.result);
			close(peer);
		}
		EXPECT(mp_unregister(ch, handle), 0);
		NOTHING(ch);
	}
	mp_close(ch);
	end_pair(&p);
	close(listener);
}

static void test_handle_reuse(void)
{
	struct mp_channel *ch = channel();
	struct pair p = tcp_pair(0);
	int first = add(ch, p.mine), second, highest = 0;

	/* Not before the kernel has let it go. */
	EXPECT(mp_unregister(ch, first), 0);
	second = add(ch, p.mine);
	TRUE(second != first);
	EXPECT(mp_unregister(ch, second), 0);
	NOTHING(ch);
	for (int i = 0; i < 300; i++) {
		int handle = add(ch, p.mine);
		struct mp_event e;

		if (handle > highest)
			highest = handle;
		EXPECT(mp_unregister(ch, handle), 0);
		EXPECT(mp_dispatch(ch, &e, 0), 0);
	}
	if (highest > 63)
		fail("expected handle numbers to be used again, came one as high as %d", highest);
	mp_close(ch);
	end_pair(&p);
}

static void test_many_handles(void)
{
	enum { COUNT = 200 };
	struct mp_channel *ch = channel();
	int listener = listening();
	static struct pair p[COUNT];
	static char buffer[COUNT];

	for (int i = 0; i < COUNT; i++) {
		p[i] = make_pair(listener, 0);
		p[i].handle = mp_register(ch, p[i].mine, &p[i], NULL, 0);
		EXPECT(p[i].handle, i);
		EXPECT(mp_read(ch, p[i].handle, &buffer[i], 1), 0);
	}
	EXPECT(mp_flush(ch), 0);
	for (int i = 0; i < COUNT; i++)
		MUST(send(p[i].peer, "x", 1, 0));
	for (int i = 0; i < COUNT; i++) {
		struct mp_event e = next(ch);

		EXPECT(e.result, 1);
		TRUE(e.cookie == &p[e.handle] && buffer[e.handle] == 'x');
		buffer[e.handle] = 0;
	}
	NOTHING(ch);
	mp_close(ch);
	for (int i = 0; i < COUNT; i++)
		end_pair(&p[i]);
	close(listener);
}

static void test_timeout(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	struct mp_event e;
	uint64_t begin;
	char buffer[8];

	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	EXPECT(mp_dispatch(ch, &e, 0), 0);
	begin = now_ns();
	EXPECT(mp_dispatch(ch, &e, 50), 0);
	TRUE(now_ns() - begin >= 50000000);
	set_timer(40, false);
	EXPECT(mp_dispatch(ch, &e, -1), -EINTR);
	set_timer(40, false);
	EXPECT(mp_dispatch(ch, &e, SOON), -EINTR);
	/* The operation has outlived the signals. */
	peer_sends(&p, "late");
	EXPECT(mp_dispatch(ch, &e, -1), 1);
	EXPECT(e.result, 4);
	mp_close(ch);
	end_pair(&p);
}

static void *send_later(void *argument)
{
	sleep_ms(50);
	peer_sends(argument, "x");
	return NULL;
}

static void test_wakes(void)
{
	struct mp_channel *ch = channel(), *other = channel();
	struct pair p = added_pair(ch, 0), q = added_pair(other, 0);
	pthread_t thread;
	char buffer[8];

	/* Two channels in one thread: the other's event is no event of this one. */
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	EXPECT(mp_read(other, q.handle, buffer, sizeof(buffer)), 0);
	EXPECT(mp_flush(other), 0);
	for (int i = 0; i < 5; i++) {
		thread = start(send_later, &q);
		SLEEPS(ch);	/* for longer than that takes */
		join(thread);
		WANT(other, q.handle, MP_OP_READ, 1);
		EXPECT(mp_read(other, q.handle, buffer, sizeof(buffer)), 0);
		EXPECT(mp_flush(other), 0);
	}
	thread = start(send_later, &p);
	WANT(ch, p.handle, MP_OP_READ, 1);
	join(thread);
	mp_close(ch);
	mp_close(other);
	end_pair(&p);
	end_pair(&q);
}

/* Data that is on the socket's error queue must not keep the kernel busy. */
static void test_error_queue(void)
{
	int stamps = SOF_TIMESTAMPING_TX_SOFTWARE | SOF_TIMESTAMPING_TX_ACK |
		     SOF_TIMESTAMPING_SOFTWARE;
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	struct pollfd poll_fd = { .fd = p.mine };
	char buffer[8];

	MUST(setsockopt(p.mine, SOL_SOCKET, SO_TIMESTAMPING, &stamps, sizeof(stamps)));
	EXPECT(mp_write(ch, p.handle, "x", 1), 0);
	WANT(ch, p.handle, MP_OP_WRITE, 1);
	peer_gets(&p, "x");
	EXPECT(poll(&poll_fd, 1, SOON), 1);
	EXPECT(poll_fd.revents & POLLERR, POLLERR);
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	SLEEPS(ch);
	peer_sends(&p, "data");
	WANT(ch, p.handle, MP_OP_READ, 4);
	mp_close(ch);
	end_pair(&p);
}

static void use_tls(int fd, int direction)
{
	struct tls12_crypto_info_aes_gcm_128 info = {
		.info = { TLS_1_2_VERSION, TLS_CIPHER_AES_GCM_128 },
	};

	MUST(setsockopt(fd, SOL_TLS, direction, &info, sizeof(info)));
}

/* What a socket has to read is not always in its receive queue, and not all there is to read. */
static void test_tls(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	char buffer[16];

	if (setsockopt(p.mine, SOL_TCP, TCP_ULP, "tls", 4) && errno == ENOENT)
		return;		/* not this kernel */
	MUST(setsockopt(p.peer, SOL_TCP, TCP_ULP, "tls", 4));
	use_tls(p.peer, TLS_TX);
	use_tls(p.mine, TLS_RX);
	EXPECT(mp_read(ch, p.handle, buffer, 4), 0);
	SLEEPS(ch);
	/* One record: the rest of it waits elsewhere. */
	peer_sends(&p, "0123456789");
	WANT(ch, p.handle, MP_OP_READ, 4);
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	WANT(ch, p.handle, MP_OP_READ, 6);
	TRUE(!memcmp(buffer, "456789", 6));
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	SLEEPS(ch);
	peer_sends(&p, "more");
	WANT(ch, p.handle, MP_OP_READ, 4);
	end_pair(&p);

	/* A record of which only the beginning has come. */
	p = added_pair(ch, 0);
	MUST(setsockopt(p.mine, SOL_TCP, TCP_ULP, "tls", 4));
	use_tls(p.mine, TLS_RX);
	EXPECT(send(p.peer, "\x17\x03\x03\0\x40 half", 10, 0), 10);
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	SLEEPS(ch);
	mp_close(ch);
	end_pair(&p);
}

/* Less than the socket shall wake anybody for. */
static void test_low_water(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	char buffer[16];
	int low = 8;
	struct mp_event e;

	MUST(setsockopt(p.mine, SOL_SOCKET, SO_RCVLOWAT, &low, sizeof(low)));
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	SLEEPS(ch);
	peer_sends(&p, "1234");
	if (may_come(ch, &e, NEVER)) {
		EXPECT(e.result, 4);
		EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	}
	SLEEPS(ch);
	peer_sends(&p, "56789abc");
	e = next(ch);
	EXPECT(e.op, MP_OP_READ);
	TRUE(e.result >= 8);
	mp_close(ch);
	end_pair(&p);
}

static void test_urgent(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	char buffer[8];

	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	EXPECT(send(p.peer, "!", 1, MSG_OOB), 1);
	SLEEPS(ch);
	peer_sends(&p, "data");
	WANT(ch, p.handle, MP_OP_READ, 4);
	mp_close(ch);
	end_pair(&p);
}

const struct test_case calls_cases[] = {
	{ "create", test_create },
	{ "echo", test_echo },
	{ "accept-many", test_accept_many },
	{ "accept-waits", test_accept_waits },
	{ "listen-late", test_listen_late },
	{ "read", test_read },
	{ "read-eof", test_read_eof },
	{ "reset", test_reset },
	{ "write", test_write },
	{ "write-large", test_write_large },
	{ "write-cut", test_write_cut },
	{ "writev", test_writev },
	{ "disconnect", test_disconnect },
	{ "unregister-drops", test_unregister_drops },
	{ "cookies", test_cookies },
	{ "mask", test_mask },
	{ "handle-reuse", test_handle_reuse },
	{ "many-handles", test_many_handles },
	{ "timeout", test_timeout },
	{ "wakes", test_wakes },
	{ "error-queue", test_error_queue },
	{ "tls", test_tls },
	{ "low-water", test_low_water },
	{ "urgent", test_urgent },
	{ }
};
