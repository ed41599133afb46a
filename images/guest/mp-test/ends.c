// SPDX-License-Identifier: GPL-2.0
/* Ends with work pending, and no memory. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "test.h"

/* --- ends --------------------------------------------------------------------------------- */

static void test_close_pending(void)
{
	enum { SIZE = 200000 };
	int listener = listening();
	char *data = make_pattern(SIZE);

	for (int i = 0; i < 20; i++) {
		struct mp_channel *ch = channel();
		struct pair p = added_pair(ch, 8192), q = added_pair(ch, 8192);
		struct iovec parts[3] = { { data, SIZE }, { data, SIZE }, { data, SIZE } };
		struct mp_event e;
		int peer;

		EXPECT(mp_accept(ch, add(ch, listener), 10, false), 0);
		EXPECT(mp_read(ch, p.handle, data, 1), 0);
		EXPECT(mp_write(ch, p.handle, data, SIZE), 0);
		EXPECT(mp_read(ch, q.handle, data, 1), 0);
		EXPECT(mp_writev(ch, q.handle, parts, 3), 0);
		EXPECT(mp_dispatch(ch, &e, 0), 0);
		if (i % 2)	/* ready, but not run */
			peer_sends(&p, "x");
		mp_close(ch);
		/* Nobody is there any more, and nothing minds. */
		peer = connected(listener);
		peer_sends(&p, "x");
		close(MUST(accept(listener, NULL, NULL)));
		close(peer);
		if (i % 4 < 2) {
			end_pair(&p);
			end_pair(&q);
		} else {
			close(p.peer);
			close(p.mine);
			close(q.peer);
			close(q.mine);
		}
	}
	close(listener);
	free(data);
}

struct flood {
	int fd[4];
	atomic_bool over;
};

static void *flood(void *argument)
{
	struct flood *f = argument;
	char buffer[256] = { 0 };

	for (int i = 0; !atomic_load(&f->over); i++) {
		send(f->fd[i % 4], buffer, 64, MSG_DONTWAIT | MSG_NOSIGNAL);
		recv(f->fd[(i + 1) % 4], buffer, sizeof(buffer), MSG_DONTWAIT);
	}
	return NULL;
}

/* Channels come and go on connections whose peers never rest. */
static void test_close_flood(void)
{
	struct flood f = { .over = false };
	pthread_t threads[2];
	struct pair p[4];
	static char buffer[4][256];

	for (int i = 0; i < 4; i++) {
		p[i] = tcp_pair(0);
		f.fd[i] = p[i].peer;
	}
	for (int i = 0; i < 2; i++)
		threads[i] = start(flood, &f);
	for (int i = 0; i < 100 * scale; i++) {
		struct mp_channel *ch = channel_of(16, 16);
		struct mp_event e;

		for (int j = 0; j < 4; j++) {
			p[j].handle = add(ch, p[j].mine);
			EXPECT(mp_read(ch, p[j].handle, buffer[j], 256), 0);
			EXPECT(mp_write(ch, p[j].handle, buffer[j], 100), 0);
		}
		for (int events = 0; events < i % 16; events++) {
			e = next(ch);
			TRUE(e.result > 0);
			if (e.op == MP_OP_READ)
				EXPECT(mp_read(ch, e.handle, buffer[e.handle], 256), 0);
			else
				EXPECT(mp_write(ch, e.handle, buffer[e.handle], 100), 0);
			if (i % 3 == 0 && events == 5)
				EXPECT(mp_unregister(ch, e.handle), 0);
		}
		mp_close(ch);
	}
	atomic_store(&f.over, true);
	for (int i = 0; i < 2; i++)
		join(threads[i]);
	for (int i = 0; i < 4; i++)
		end_pair(&p[i]);
}

static void serve_until_killed(int listener)
{
	struct mp_channel *ch = channel();
	static char buffer[64][256];
	static char large[1 << 20];
	int handle = add(ch, listener), clients = 0;

	EXPECT(mp_accept(ch, handle, 1000, false), 0);
	for (;;) {
		struct mp_event e = next(ch);

		if (e.op == MP_OP_ACCEPT) {
			int connection = add(ch, e.result);

			/* Not before the request is down: the number may be another's then. */
			EXPECT(mp_flush(ch), 0);
			close(e.result);
			EXPECT(mp_read(ch, connection, buffer[connection % 64], 256), 0);
			if (clients++ % 2)
				EXPECT(mp_write(ch, connection, large, sizeof(large)), 0);
		} else if (e.op == MP_OP_READ) {
			EXPECT(mp_read(ch, e.handle, buffer[e.handle % 64], 256), 0);
		}
	}
}

static void test_kill(void)
{
	enum { CLIENTS = 8 };
	int listener = listening();

	for (int round = 0; round < 8; round++) {
		int peers[CLIENTS];
		pid_t pid = child();
		char buffer[64] = { 0 };

		if (!pid)
			serve_until_killed(listener);
		for (int i = 0; i < CLIENTS; i++)
			peers[i] = connected(listener);
		wait_backlog(listener, 0);
		if (round % 2)
			sleep_ms(5);
		for (int i = 0; i < 20 * round; i++)
			send(peers[i % CLIENTS], buffer, sizeof(buffer),
			     MSG_DONTWAIT | MSG_NOSIGNAL);
		MUST(kill(pid, SIGKILL));
		for (int i = 0; i < 20 * round; i++)
			send(peers[i % CLIENTS], buffer, sizeof(buffer),
			     MSG_DONTWAIT | MSG_NOSIGNAL);
		EXPECT(WTERMSIG(status_of(pid)), SIGKILL);
		for (int i = 0; i < CLIENTS; i++) {
			ssize_t n;

			do {
				n = recv(peers[i], buffer, sizeof(buffer), 0);
			} while (n > 0);
			TRUE(n == 0 || errno == ECONNRESET);
			close(peers[i]);
		}
	}
	close(listener);
}

static void test_many_channels(void)
{
	struct pair p = tcp_pair(0);
	int before = open_descriptors();
	char byte;

	for (int i = 0; i < 1000 * scale; i++) {
		struct raw r = raw_channel(1 << i % 8, 1 << i / 8 % 8);

		if (i % 4 == 0) {
			raw_register(&r, i, p.mine);
			raw_begin(&r, (struct mp_request){
				.op = MP_OP_READ, .handle = i,
				.addr = (uintptr_t)&byte, .len = 1 });
		}
		raw_close(&r);
	}
	EXPECT(open_descriptors(), before);
	end_pair(&p);
}

/* Thousands of handles in one channel that ends: memory, and the time it takes. */
static void test_many_registrations(void)
{
	enum { COUNT = 2000 };
	struct raw r = raw_channel(1024, 1024);
	struct pair p = tcp_pair(0);
	static char buffer;

	for (uint32_t i = 0; i < COUNT; i++) {
		raw_register(&r, i * 500, p.mine);
		if (i % 2)
			raw_begin(&r, (struct mp_request){
				.op = MP_OP_READ, .handle = i * 500,
				.addr = (uintptr_t)&buffer, .len = 1 });
	}
	peer_sends(&p, "xyz");
	for (int i = 0; i < 3; i++)
		EXPECT(raw_next(&r).result, 1);
	close(p.mine);
	peer_sees_life(p.peer);
	raw_close(&r);
	peer_sees_end(p.peer);
	close(p.peer);
}

/* --- no memory ---------------------------------------------------------------------------- */

static void set_fault(int fd, int number)
{
	char text[16];
	int length = snprintf(text, sizeof(text), "%d", number);

	EXPECT(pwrite(fd, text, length, 0), length);
}

static bool no_memory(int ret)
{
	if (ret >= 0)
		return false;
	if (ret != -ENOMEM && ret != -ENOBUFS && ret != -ENFILE)
		fail("expected success or -ENOMEM, came %s", show(ret));
	return true;
}

/* A channel's whole life, in which an allocation may fail. */
/* One request, and what comes of it; returns the result of its completion, or 0. */
static int try_one(struct raw *r, struct mp_request request)
{
	int result = 0;

	raw_put(r, request);
	EXPECT(enter(r->fd, MP_ENTER_SUBMIT), 1);
	EXPECT(raw_wait(r, 0, request.op == MP_OP_READ || request.op == MP_OP_WRITE ? 5000000 : 0),
	       0);
	while (raw_waiting(r)) {
		struct mp_completion c = raw_take(r);

		/* Its registration has found no memory. */
		if (c.result == -ENOENT || c.result == -EBADF)
			continue;
		if (!no_memory(c.result) && !no_memory(c.error) && c.op == request.op)
			result = c.result;
	}
	return result;
}

/* The whole life of a channel, with everything that the module allocates for. */
static void live(int device_fd, int listener, const struct pair *p, int file, char *data,
		 size_t size)
{
	struct mp_create args = { SIZES(8, 8), .flags = MP_PARTITION | MP_LWSOCKET |
							(batch ? MP_BATCH : 0) };
	struct iovec parts[2] = { { data, size }, { data, size } };
	unsigned char mask = 0xfe;
	enum { PAIR = 1, ORIGINAL, LIGHT, FILE_, PART = 100000 };
	const struct mp_request before[] = {
		{ .op = MP_OP_REGISTER, .handle = PAIR, .fd = p->mine },
		{ .op = MP_OP_REGISTER, .handle = ORIGINAL, .fd = listener },
		{ .op = MP_OP_REGISTER, .handle = PART, .fd = listener,
		  .addr = (uintptr_t)&mask, .len = 1 },
		{ .op = MP_OP_READ, .handle = PAIR, .addr = (uintptr_t)data, .len = 1 },
		{ .op = MP_OP_ACCEPT, .handle = PART, .len = 2 },
		{ .op = MP_OP_WRITEV, .handle = PAIR, .addr = (uintptr_t)parts, .len = 2 },
		{ .op = MP_OP_UNREGISTER, .handle = PAIR },
		{ .op = MP_OP_REGISTER, .handle = FILE_, .fd = file },
		{ .op = MP_OP_WRITE, .handle = FILE_, .addr = (uintptr_t)data, .len = 5000,
		  .flags = MP_AT_OFFSET },
		{ .op = MP_OP_READ, .handle = FILE_, .addr = (uintptr_t)data, .len = 5000,
		  .flags = MP_AT_OFFSET },
	};
	struct raw r = { .fd = minus_errno(ioctl(device_fd, MP_IOC_CREATE, &args)) };
	void *memory;
	int number;

	if (no_memory(r.fd))
		return;
	r.args = args;
	memory = mmap(NULL, args.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, r.fd, 0);
	if (memory == MAP_FAILED) {
		no_memory(-errno);
		close(r.fd);
		return;
	}
	r.shared = memory;
	r.sq = (void *)((char *)memory + args.sq_offset);
	r.cq = (void *)((char *)memory + args.cq_offset);
	for (size_t i = 0; i < sizeof(before) / sizeof(*before); i++)
		try_one(&r, before[i]);
	number = try_one(&r, (struct mp_request){ .op = MP_OP_ACCEPT, .handle = ORIGINAL, .len = 1,
						  .flags = MP_ACCEPT_LWSOCKET });
	if (number >= MP_LWSOCKET_BASE) {
		int fd;

		try_one(&r, (struct mp_request){ .op = MP_OP_REGISTER, .handle = LIGHT,
						 .fd = number });
		fd = try_one(&r, (struct mp_request){ .op = MP_OP_CONVERT, .handle = LIGHT });
		if (fd > 0)
			close(fd);
	}
	raw_close(&r);
}

static void test_no_memory(void)
{
	enum { SIZE = 100000, MOST = 3000 };
	int fd = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC), failed;
	int listener = listening(), device_fd = device();
	char *data = make_pattern(SIZE), path[64];
	int file;

	if (fd < 0)
		return;
	snprintf(path, sizeof(path), "/tmp/mp-test-memory-%d", getpid());
	file = MUST(open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
	MUST(unlink(path));
	if (!write_text("/sys/kernel/debug/failslab/ignore-gfp-wait", "N") ||
	    !write_text("/sys/kernel/debug/failslab/verbose", "0") ||
	    !write_text("/sys/kernel/debug/fail_page_alloc/ignore-gfp-wait", "N") ||
	    !write_text("/sys/kernel/debug/fail_page_alloc/verbose", "0") ||
	    !write_text("/sys/kernel/debug/fail_page_alloc/min-order", "0"))
		return;
	for (failed = 0; failed < MOST; failed++) {
		struct pair p = make_pair(listener, 8192);
		int peer = connected(listener), before = open_descriptors();
		char text[16] = "";

		wait_backlog(listener, 1);
		set_fault(fd, failed + 1);
		live(device_fd, listener, &p, file, data, SIZE);
		EXPECT(pread(fd, text, sizeof(text) - 1, 0) > 0, true);
		set_fault(fd, 0);
		EXPECT(open_descriptors(), before);
		if (backlog(listener))
			close(MUST(accept(listener, NULL, NULL)));
		end_pair(&p);
		close(peer);
		if (atoi(text))		/* nothing was left to fail */
			break;
	}
	TRUE(failed > 40 && failed < MOST);
	close(file);
	free(data);
}

/*
 * What --exhaust does: take as much of the kernel's memory through channels as it gives, in every
 * way there is, and keep it for a while.
 */
int exhaust(void)
{
	enum { MOST = 4000, PARTS = 1024 };
	static struct iovec parts[PARTS];
	static char block[1 << 16];
	int channels = 0, handles = 0, writes = 0;
	bool refused = false;

	report_fd = STDERR_FILENO;
	for (int i = 0; i < PARTS; i++)
		parts[i] = (struct iovec){ block, sizeof(block) };
	while (!refused && channels < MOST) {
		struct mp_options options = { .flags = MP_BATCH | MP_LWSOCKET, .requests = 32768,
					      .completions = 32768 };
		struct mp_channel *ch = mp_create(&options);
		int ends[2];

		if (!ch)
			break;
		channels++;
		/* Handles, and in each a write that waits with the longest array of buffers. */
		for (int i = 0; i < 200; i++) {
			int handle;

			if (pipe2(ends, O_CLOEXEC | O_NONBLOCK))
				break;
			handle = mp_register(ch, ends[1], NULL, NULL, 0);
			close(ends[1]);
			if (handle < 0 || mp_writev(ch, handle, parts, PARTS) < 0) {
				refused = true;
				break;
			}
			handles++;
			writes++;
		}
		if (mp_flush(ch))
			refused = true;
	}
	printf("exhaust: %d channels with %d handles and %d writes, then %s\n", channels, handles,
	       writes, strerror(errno));
	fflush(stdout);
	sleep_ms(1000);
	return 0;
}

const struct test_case ends_cases[] = {
	{ "close-pending", test_close_pending },
	{ "close-flood", test_close_flood },
	{ "kill", test_kill },
	{ "many-channels", test_many_channels },
	{ "many-registrations", test_many_registrations },
	{ "no-memory", test_no_memory },
	{ }
};
