// SPDX-License-Identifier: GPL-2.0
/* Handles of every other kind: UDP, UNIX sockets, pipes, eventfd and its like, regular files. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>

#include "test.h"

/* --- messages ------------------------------------------------------------------------- */

static struct pair udp_pair(void)
{
	struct pair p = { .mine = bound(MUST(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0))),
			  .peer = bound(MUST(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0))) };
	struct timeval limit = { SOON / 1000, 0 };
	struct sockaddr_in address;
	socklen_t size = sizeof(address);

	MUST(getsockname(p.mine, (struct sockaddr *)&address, &size));
	MUST(connect(p.peer, (struct sockaddr *)&address, size));
	MUST(getsockname(p.peer, (struct sockaddr *)&address, &size));
	MUST(connect(p.mine, (struct sockaddr *)&address, size));
	MUST(setsockopt(p.peer, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)));
	return p;
}

static struct pair unix_pair(int type)
{
	struct timeval limit = { SOON / 1000, 0 };
	struct pair p;
	int ends[2];

	MUST(socketpair(AF_UNIX, type | SOCK_CLOEXEC, 0, ends));
	p.mine = ends[0];
	p.peer = ends[1];
	MUST(setsockopt(p.peer, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)));
	return p;
}

/* A message is read whole or cut off, and one write is one message. */
static void messages(struct pair p)
{
	struct mp_channel *ch = channel();
	struct iovec parts[2] = { { "ab", 2 }, { "cde", 3 } };
	char buffer[8];

	p.handle = add(ch, p.mine);
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	SLEEPS(ch);
	peer_sends(&p, "one");
	peer_sends(&p, "twelve bytes");
	peer_sends(&p, "last");
	WANT(ch, p.handle, MP_OP_READ, 3);
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	WANT(ch, p.handle, MP_OP_READ, 8);
	TRUE(!memcmp(buffer, "twelve b", 8));
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	WANT(ch, p.handle, MP_OP_READ, 4);
	EXPECT(mp_writev(ch, p.handle, parts, 2), 0);
	WANT(ch, p.handle, MP_OP_WRITEV, 5);
	EXPECT(mp_write(ch, p.handle, NULL, 0), 0);
	WANT(ch, p.handle, MP_OP_WRITE, 0);
	EXPECT(recv(p.peer, buffer, sizeof(buffer), 0), 5);
	EXPECT(recv(p.peer, buffer, sizeof(buffer), 0), 0);
	EXPECT(mp_pread(ch, p.handle, buffer, 1, 0), 0);
	WANT(ch, p.handle, MP_OP_READ, -ESPIPE);
	EXPECT(mp_unregister(ch, p.handle), 0);
	EXPECT(mp_flush(ch), 0);
	EXPECT(send(p.mine, "x", 1, 0), 1);
	end_pair(&p);
	mp_close(ch);
}

static void test_udp(void)
{
	struct mp_channel *ch = channel();
	int alone = MUST(socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0));
	struct pair p = udp_pair();
	int handle = add(ch, alone);

	EXPECT(mp_write(ch, handle, "x", 1), 0);
	WANT(ch, handle, MP_OP_WRITE, -EDESTADDRREQ);
	EXPECT(mp_accept(ch, handle, 1, false), 0);
	WANT(ch, handle, MP_OP_ACCEPT, -EINVAL);
	mp_close(ch);
	messages(p);
	/* Nobody listens there: the error of the message before. */
	ch = channel();
	p = udp_pair();
	close(p.peer);
	handle = add(ch, p.mine);
	EXPECT(mp_write(ch, handle, "x", 1), 0);
	WANT(ch, handle, MP_OP_WRITE, 1);
	EXPECT(mp_read(ch, handle, &p, sizeof(p)), 0);
	WANT(ch, handle, MP_OP_READ, -ECONNREFUSED);
	mp_close(ch);
}

static void test_unix_messages(void)
{
	messages(unix_pair(SOCK_DGRAM));
	messages(unix_pair(SOCK_SEQPACKET));
}

/* A datagram that finds the other queue full waits for room in it. */
static void test_unix_full(void)
{
	struct mp_channel *ch = channel();
	struct pair p = unix_pair(SOCK_DGRAM);
	char buffer[8];
	int queued = 0;
	struct mp_event e;

	p.handle = add(ch, p.mine);
	for (;; queued++) {
		EXPECT(mp_write(ch, p.handle, "x", 1), 0);
		if (!may_come(ch, &e, NEVER))
			break;
		EXPECT(e.result, 1);
	}
	TRUE(queued > 0);
	SLEEPS(ch);
	for (int i = 0; i < queued; i++)
		EXPECT(recv(p.peer, buffer, sizeof(buffer), 0), 1);
	WANT(ch, p.handle, MP_OP_WRITE, 1);
	mp_close(ch);
	end_pair(&p);
}

static void test_unix_stream(void)
{
	enum { SIZE = 3000000 };
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "\0mp-test" };
	int listener = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)), peer;
	struct mp_channel *ch = channel_with(MP_LWSOCKET);
	struct slow_reader reader = { .size = SIZE };
	char *data = make_pattern(SIZE), buffer[8];
	struct mp_event e;
	pthread_t thread;
	int handle;

	MUST(bind(listener, (struct sockaddr *)&address, sizeof(address)));
	MUST(listen(listener, 8));
	handle = add(ch, listener);
	EXPECT(mp_accept(ch, handle, 2, true), 0);
	NOTHING(ch);
	peer = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	MUST(connect(peer, (struct sockaddr *)&address, sizeof(address)));
	e = next(ch);
	TRUE(e.op == MP_OP_ACCEPT && e.result >= 0 && !mp_is_lwsocket(e.result) && e.more);
	handle = add(ch, e.result);
	EXPECT(mp_write(ch, handle, data, SIZE), 0);
	SLEEPS(ch);
	reader.fd = peer;
	thread = start(read_slowly, &reader);
	WANT(ch, handle, MP_OP_WRITE, SIZE);
	join(thread);
	EXPECT(mp_read(ch, handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	EXPECT(mp_disconnect(ch, handle), 0);
	/* Its own read ends, too. */
	for (int i = 0; i < 2; i++) {
		e = next(ch);
		TRUE(e.op == MP_OP_READ || e.op == MP_OP_DISCONNECT);
		EXPECT(e.result, 0);
	}
	peer_sees_end(peer);
	EXPECT(mp_write(ch, handle, "x", 1), 0);
	WANT(ch, handle, MP_OP_WRITE, -EPIPE);
	mp_close(ch);
	close(peer);
	close(listener);
	free(data);
}

/* --- pipes ------------------------------------------------------------------------------ */

static void test_pipe(void)
{
	enum { SIZE = 1000000 };
	struct mp_channel *ch = channel();
	char *data = make_pattern(SIZE), buffer[8];
	int ends[2], reads, writes;
	struct slow_reader reader = { .size = SIZE };
	pthread_t thread;

	MUST(pipe2(ends, O_CLOEXEC));
	reads = add(ch, ends[0]);
	writes = add(ch, ends[1]);
	EXPECT(mp_read(ch, reads, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	SLEEPS(ch);
	EXPECT(write(ends[1], "ping", 4), 4);
	WANT(ch, reads, MP_OP_READ, 4);
	EXPECT(mp_write(ch, reads, buffer, 1), 0);
	WANT(ch, reads, MP_OP_WRITE, -EBADF);
	EXPECT(mp_read(ch, writes, buffer, 1), 0);
	WANT(ch, writes, MP_OP_READ, -EBADF);
	EXPECT(mp_disconnect(ch, reads), 0);
	WANT(ch, reads, MP_OP_DISCONNECT, -ENOTSOCK);
	EXPECT(mp_convert(ch, reads), 0);
	WANT(ch, reads, MP_OP_CONVERT, -EINVAL);
	EXPECT(mp_accept(ch, reads, 1, false), 0);
	WANT(ch, reads, MP_OP_ACCEPT, -EINVAL);
	/* More than it holds. */
	EXPECT(mp_write(ch, writes, data, SIZE), 0);
	SLEEPS(ch);
	reader.fd = ends[0];
	thread = start(read_slowly, &reader);
	WANT(ch, writes, MP_OP_WRITE, SIZE);
	join(thread);
	/* Its end, from both sides. */
	EXPECT(mp_read(ch, reads, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	close(ends[1]);
	EXPECT(mp_unregister(ch, writes), 0);
	EXPECT(mp_flush(ch), 0);
	WANT(ch, reads, MP_OP_READ, 0);
	MUST(pipe2(ends, O_CLOEXEC));
	writes = add(ch, ends[1]);
	close(ends[0]);
	EXPECT(mp_write(ch, writes, "x", 1), 0);
	WANT(ch, writes, MP_OP_WRITE, -EPIPE);	/* and no signal, which would end us */
	mp_close(ch);
	free(data);
}

/* Open for both, a FIFO has a wait queue for each. */
static void test_fifo(void)
{
	struct mp_channel *ch = channel();
	enum { SIZE = 1 << 20 };
	struct slow_reader reader = { .size = SIZE };
	char path[64], buffer[8], *data = make_pattern(SIZE);
	pthread_t thread;
	int fd, handle;

	snprintf(path, sizeof(path), "/tmp/mp-test-fifo-%d", getpid());
	MUST(mkfifo(path, 0600));
	fd = MUST(open(path, O_RDWR | O_CLOEXEC));
	MUST(unlink(path));
	handle = add(ch, fd);
	EXPECT(mp_read(ch, handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	EXPECT(mp_write(ch, handle, "abc", 3), 0);
	for (int i = 0; i < 2; i++) {
		struct mp_event e = next(ch);

		TRUE(e.op == MP_OP_READ || e.op == MP_OP_WRITE);
		EXPECT(e.result, 3);
	}
	EXPECT(mp_write(ch, handle, data, SIZE), 0);
	SLEEPS(ch);
	reader.fd = fd;
	thread = start(read_slowly, &reader);
	WANT(ch, handle, MP_OP_WRITE, SIZE);
	join(thread);
	EXPECT(mp_read(ch, handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	mp_close(ch);
	close(fd);
	free(data);
}

/* --- events, timers, signals -------------------------------------------------------------- */

static void test_eventfd(void)
{
	struct mp_channel *ch = channel();
	int fd = MUST(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)), handle = add(ch, fd);
	int blocking = MUST(eventfd(0, EFD_CLOEXEC)), second = add(ch, blocking);
	uint64_t value = 0, much = UINT64_MAX - 1, three = 3;
	char small[4];

	EXPECT(mp_read(ch, handle, &value, sizeof(value)), 0);
	SLEEPS(ch);
	EXPECT(write(fd, &three, sizeof(three)), 8);
	WANT(ch, handle, MP_OP_READ, 8);
	EXPECT(value, 3);
	EXPECT(mp_read(ch, second, &value, sizeof(value)), 0);
	NOTHING(ch);
	EXPECT(write(blocking, &three, sizeof(three)), 8);
	WANT(ch, second, MP_OP_READ, 8);
	EXPECT(mp_read(ch, handle, small, sizeof(small)), 0);
	WANT(ch, handle, MP_OP_READ, -EINVAL);
	/* A write that would overflow it waits. One that could block is refused. */
	EXPECT(mp_write(ch, handle, &much, sizeof(much)), 0);
	WANT(ch, handle, MP_OP_WRITE, 8);
	EXPECT(mp_write(ch, handle, &three, sizeof(three)), 0);
	SLEEPS(ch);
	EXPECT(read(fd, &value, sizeof(value)), 8);
	WANT(ch, handle, MP_OP_WRITE, 8);
	EXPECT(mp_write(ch, second, &three, sizeof(three)), 0);
	WANT(ch, second, MP_OP_WRITE, -EOPNOTSUPP);
	mp_close(ch);
	close(fd);
	close(blocking);
}

static void test_timerfd(void)
{
	struct mp_channel *ch = channel();
	struct itimerspec soon = { .it_value.tv_nsec = 20000000 };
	int fd = MUST(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC)), handle = add(ch, fd);
	uint64_t ticks = 0;

	EXPECT(mp_read(ch, handle, &ticks, sizeof(ticks)), 0);
	NOTHING(ch);
	MUST(timerfd_settime(fd, 0, &soon, NULL));
	WANT(ch, handle, MP_OP_READ, 8);
	EXPECT(ticks, 1);
	EXPECT(mp_write(ch, handle, &ticks, sizeof(ticks)), 0);
	WANT(ch, handle, MP_OP_WRITE, -EINVAL);
	EXPECT(mp_read(ch, handle, &ticks, sizeof(ticks)), 0);
	mp_close(ch);
	close(fd);
}

static void test_signalfd(void)
{
	struct mp_channel *ch = channel();
	struct signalfd_siginfo info;
	sigset_t set;
	int fd, handle;
	pid_t pid;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
	fd = MUST(signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
	handle = add(ch, fd);
	EXPECT(mp_read(ch, handle, &info, sizeof(info)), 0);
	NOTHING(ch);
	MUST(kill(getpid(), SIGUSR1));
	WANT(ch, handle, MP_OP_READ, sizeof(info));
	EXPECT(info.ssi_signo, SIGUSR1);
	mp_close(ch);
	/* The wait queue belongs to the process, and goes before the channel may. */
	for (int i = 0; i < 3; i++) {
		pid = child();
		if (!pid) {
			ch = channel();
			EXPECT(mp_read(ch, add(ch, fd), &info, sizeof(info)), 0);
			NOTHING(ch);
			if (i == 1)
				execl("/bin/true", "true", NULL);
			if (i == 2)
				kill(getpid(), SIGKILL);
			_exit(0);
		}
		status_of(pid);
	}
	close(fd);
}

/* --- regular files --------------------------------------------------------------------------- */

static int new_file(int flags)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/tmp/mp-test-file-%d", getpid());
	fd = MUST(open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | flags, 0600));
	MUST(unlink(path));
	return fd;
}

static void test_file(void)
{
	enum { SIZE = 300000 };
	struct mp_channel *ch = channel();
	char *data = make_pattern(SIZE), *back = calloc(1, SIZE + 10);
	struct iovec parts[3] = { { data, 1000 }, { data + 1000, 100000 },
				  { data + 101000, SIZE - 101000 } };
	int fd = new_file(0), handle = add(ch, fd), only = MUST(open("/proc/self/exe", O_RDONLY));
	struct rlimit limit = { 1000, RLIM_INFINITY };

	TRUE(back);
	EXPECT(mp_writev(ch, handle, parts, 3), 0);
	WANT(ch, handle, MP_OP_WRITEV, SIZE);
	EXPECT(lseek(fd, 0, SEEK_END), SIZE);
	/* The handle's position is at the end. */
	EXPECT(mp_read(ch, handle, back, 10), 0);
	WANT(ch, handle, MP_OP_READ, 0);
	EXPECT(mp_pread(ch, handle, back, SIZE + 10, 0), 0);
	WANT(ch, handle, MP_OP_READ, SIZE);
	TRUE(!memcmp(back, data, SIZE));
	EXPECT(mp_pread(ch, handle, back, 100, SIZE - 7), 0);
	WANT(ch, handle, MP_OP_READ, 7);
	EXPECT(mp_pread(ch, handle, back, 100, SIZE + 7), 0);
	WANT(ch, handle, MP_OP_READ, 0);
	EXPECT(mp_pread(ch, handle, back, 100, -1), 0);
	WANT(ch, handle, MP_OP_READ, -EINVAL);
	EXPECT(mp_pwrite(ch, handle, "abc", 3, 5), 0);
	WANT(ch, handle, MP_OP_WRITE, 3);
	EXPECT(pread(fd, back, 9, 2), 9);
	TRUE(!memcmp(back + 3, "abc", 3) && !memcmp(back, data + 2, 3));
	/* Registered again, it starts where the descriptor is. */
	EXPECT(lseek(fd, 100, SEEK_SET), 100);
	handle = add(ch, fd);
	EXPECT(mp_read(ch, handle, back, 50), 0);
	WANT(ch, handle, MP_OP_READ, 50);
	EXPECT(mp_read(ch, handle, back + 50, 50), 0);
	WANT(ch, handle, MP_OP_READ, 50);
	TRUE(!memcmp(back, data + 100, 100));
	EXPECT(lseek(fd, 0, SEEK_CUR), 100);
	/* Wrong ways to use one. */
	EXPECT(mp_read(ch, handle, NO_ADDRESS, 50), 0);
	WANT(ch, handle, MP_OP_READ, -EFAULT);
	EXPECT(mp_write(ch, handle, NO_ADDRESS, 50), 0);
	WANT(ch, handle, MP_OP_WRITE, -EFAULT);
	EXPECT(mp_disconnect(ch, handle), 0);
	WANT(ch, handle, MP_OP_DISCONNECT, -ENOTSOCK);
	EXPECT(mp_write(ch, add(ch, only), data, 1), 0);
	EXPECT(next(ch).result, -EBADF);
	/* The limit on a file's size is the owner's, whoever does the writing. */
	signal(SIGXFSZ, SIG_IGN);
	MUST(setrlimit(RLIMIT_FSIZE, &limit));
	EXPECT(mp_pwrite(ch, handle, data, 100, 950), 0);
	{
		struct mp_event e = next(ch);

		EXPECT(e.result, 50);
		EXPECT(e.error, -EFBIG);
	}
	EXPECT(mp_pwrite(ch, handle, data, 100, 1000), 0);
	WANT(ch, handle, MP_OP_WRITE, -EFBIG);
	mp_close(ch);
	close(fd);
	free(data);
	free(back);
}

static void test_file_append(void)
{
	struct mp_channel *ch = channel();
	int fd = new_file(O_APPEND), handle;
	char buffer[8];

	EXPECT(write(fd, "abc", 3), 3);
	EXPECT(lseek(fd, 0, SEEK_SET), 0);
	handle = add(ch, fd);
	EXPECT(mp_write(ch, handle, "def", 3), 0);
	WANT(ch, handle, MP_OP_WRITE, 3);
	EXPECT(pread(fd, buffer, 8, 0), 6);
	TRUE(!memcmp(buffer, "abcdef", 6));
	mp_close(ch);
	close(fd);
}

/* Work under way when its handle, channel or process goes. */
static void test_file_ends(void)
{
	enum { SIZE = 1 << 20, FILES = 4 };
	char *data = make_pattern(SIZE);
	struct iovec parts[2] = { { data, SIZE / 2 }, { data + SIZE / 2, SIZE / 2 } };

	for (int i = 0; i < 12 * scale; i++) {
		pid_t pid = child();

		if (!pid) {
			struct mp_channel *ch = channel();

			for (int j = 0; j < FILES; j++) {
				int fd = new_file(0), handle = add(ch, fd);

				EXPECT(mp_writev(ch, handle, parts, 2), 0);
				EXPECT(mp_flush(ch), 0);
				EXPECT(mp_pread(ch, handle, data, SIZE, 0), 0);
				EXPECT(mp_flush(ch), 0);
				close(fd);
				if (i % 4 == 0)
					EXPECT(mp_unregister(ch, handle), 0);
			}
			if (i % 4 == 1)
				mp_close(ch);
			if (i % 4 == 2)
				kill(getpid(), SIGKILL);
			if (i % 4 == 3)
				execl("/bin/true", "true", NULL);
			_exit(0);
		}
		status_of(pid);
	}
	free(data);
}

/* --- a file on a slow disk --------------------------------------------------------------------- */

/* What --disk does: a channel answers while a read of it waits for the disk. */
static void serve_beside_disk(const char *path)
{
	/* The first MiB may come out of the disk's allowance for bursts. */
	enum { SIZE = 4 << 20, ECHOES = 20 };
	struct mp_channel *ch = channel();
	char *data = make_pattern(SIZE), *back = calloc(1, SIZE), byte = 0;
	int fd = MUST(open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
	int file = add(ch, fd), before = 0, writing = 0;
	struct pair p = added_pair(ch, 0);
	uint64_t began;
	struct mp_event e;

	TRUE(back);
	/* Down to the disk, and out of memory. */
	EXPECT(mp_write(ch, file, data, SIZE), 0);
	WANT(ch, file, MP_OP_WRITE, SIZE);
	MUST(fsync(fd));
	EXPECT(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);

	began = now_ns();
	EXPECT(mp_pread(ch, file, back, SIZE, 0), 0);
	for (;;) {
		EXPECT(mp_read(ch, p.handle, &byte, 1), 0);
		EXPECT(mp_flush(ch), 0);
		EXPECT(send(p.peer, "x", 1, MSG_NOSIGNAL), 1);
		e = next(ch);
		if (e.handle == file)
			break;
		EXPECT(e.result, 1);
		before++;
	}
	EXPECT(e.op, MP_OP_READ);
	EXPECT(e.result, SIZE);
	TRUE(!memcmp(back, data, SIZE));
	printf("disk: %d echoes while 4 MiB were read in %llu ms\n", before,
	       (unsigned long long)(now_ns() - began) / 1000000);
	WANT(ch, p.handle, MP_OP_READ, 1);

	/* The same for a write that has to be on the disk (O_SYNC). */
	mp_unregister(ch, file);
	close(fd);
	fd = MUST(open(path, O_RDWR | O_SYNC | O_CLOEXEC));
	file = add(ch, fd);
	EXPECT(mp_pwrite(ch, file, data, SIZE, 0), 0);
	for (;;) {
		EXPECT(mp_read(ch, p.handle, &byte, 1), 0);
		EXPECT(mp_flush(ch), 0);
		EXPECT(send(p.peer, "x", 1, MSG_NOSIGNAL), 1);
		e = next(ch);
		if (e.handle == file)
			break;
		writing++;
	}
	EXPECT(e.result, SIZE);
	printf("disk: %d echoes while 4 MiB were written\n", writing);
	if (before < ECHOES || writing < ECHOES)
		fail("expected %d echoes in either, the channel waited for the disk", ECHOES);
	mp_close(ch);
	end_pair(&p);
	close(fd);
	free(data);
	free(back);
}

int disk(const char *path)
{
	report_fd = STDERR_FILENO;
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (int mode = 0; mode < 2; mode++) {
		batch = mode;
		serve_beside_disk(path);
	}
	printf("ok disk\n");
	return 0;
}

const struct test_case files_cases[] = {
	{ "udp", test_udp },
	{ "unix-messages", test_unix_messages },
	{ "unix-full", test_unix_full },
	{ "unix-stream", test_unix_stream },
	{ "pipe", test_pipe },
	{ "fifo", test_fifo },
	{ "eventfd", test_eventfd },
	{ "timerfd", test_timerfd },
	{ "signalfd", test_signalfd },
	{ "file", test_file },
	{ "file-append", test_file_append },
	{ "file-ends", test_file_ends },
	{ }
};
