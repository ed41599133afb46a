// SPDX-License-Identifier: GPL-2.0
/*
 * Conformance and bad input: every call of libmegapipe, and everything that a
 * program can do wrong to a channel, through the library and below it.
 *
 * Each case runs in a child of its own, under a time limit, and ends in one
 * line: "ok NAME", or "FAIL NAME: what was expected, what came". What the kernel
 * itself complains about while a case runs (a warning, a report of a sanitizer)
 * is a failure of that case.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/errqueue.h>
#include <linux/net_tstamp.h>
#include <linux/tls.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "megapipe.h"

enum {
	SOON = 10000,	/* ms: longer than an event that must come can take */
	NEVER = 30,	/* ms: how long to look for an event that must not come */
	/* Descriptors from here on belong to nobody but the kernel's accepts. */
	FIRST_ACCEPTED = 700,
};

/* An address of the kernel's half. */
#define KERNEL_ADDRESS	((void *)0xffff888000000000UL)
/* Below mmap_min_addr: nothing is there. */
#define NO_ADDRESS	((void *)16)

static bool batch;		/* the mode of this run of a case */
static int scale = 1;		/* how often the long loops go round */
static int report_fd = -1;

/* --- failing -------------------------------------------------------------------- */

static void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...)
{
	char text[512];
	va_list args;
	int length;

	va_start(args, format);
	length = vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	if (length >= (int)sizeof(text))
		length = sizeof(text) - 1;
	if (write(report_fd, text, length) != length)
		abort();
	_exit(1);
}

static const char *show(long long value)
{
	static _Thread_local char text[4][40];
	static _Thread_local int turn;
	char *t = text[turn++ & 3];
	const char *name = value < 0 && value > -4096 ? strerrorname_np(-value) : NULL;

	if (name)
		snprintf(t, sizeof(text[0]), "-%s", name);
	else
		snprintf(t, sizeof(text[0]), "%lld", value);
	return t;
}

/* The expression itself says what it is about. */
#define EXPECT(expression, want) do {							\
	long long got_ = (expression), want_ = (want);					\
	if (got_ != want_)								\
		fail("line %d: %s: expected %s, came %s", __LINE__, #expression,	\
		     show(want_), show(got_));						\
} while (0)

#define TRUE(condition) do {								\
	if (!(condition))								\
		fail("line %d: expected %s", __LINE__, #condition);			\
} while (0)

/* A step without which the case makes no sense. */
#define MUST(call) ({									\
	long long must_ = (long long)(call);						\
	if (must_ == -1)								\
		fail("line %d: %s: %s", __LINE__, #call, strerror(errno));		\
	must_;										\
})

static int minus_errno(long ret)
{
	return ret < 0 ? -errno : ret;
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static void sleep_ms(int ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000L };

	while (nanosleep(&t, &t) < 0)
		;
}

/* xorshift: the same numbers in each run. */
static uint64_t random_next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* --- sockets --------------------------------------------------------------------- */

static int port_of(int fd)
{
	struct sockaddr_in address;
	socklen_t size = sizeof(address);

	MUST(getsockname(fd, (struct sockaddr *)&address, &size));
	return ntohs(address.sin_port);
}

static int tcp_socket(void)
{
	return MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
}

static int bound(int fd)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};

	MUST(bind(fd, (struct sockaddr *)&address, sizeof(address)));
	return fd;
}

static int listening(void)
{
	int fd = bound(tcp_socket());

	MUST(listen(fd, 1024));
	return fd;
}

static int connected_from(int fd, int listener)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
		.sin_port = htons(port_of(listener)),
	};
	struct linger reset = { 1, 0 };

	/* Closing resets: no connection of a case lingers on beyond it. */
	MUST(setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)));
	MUST(connect(fd, (struct sockaddr *)&address, sizeof(address)));
	return fd;
}

static int connected(int listener)
{
	return connected_from(tcp_socket(), listener);
}

/* Close with a FIN instead. */
static void close_politely(int fd)
{
	struct linger no = { 0, 0 };

	MUST(setsockopt(fd, SOL_SOCKET, SO_LINGER, &no, sizeof(no)));
	MUST(close(fd));
}

static unsigned int backlog(int listener)
{
	struct tcp_info info;
	socklen_t size = sizeof(info);

	MUST(getsockopt(listener, IPPROTO_TCP, TCP_INFO, &info, &size));
	return info.tcpi_unacked;	/* of a listener: connections that wait */
}

static void wait_backlog(int listener, unsigned int count)
{
	for (int i = 0; backlog(listener) != count; i++) {
		if (i == SOON)
			fail("expected %u connections to wait, %u do", count, backlog(listener));
		sleep_ms(1);
	}
}

struct pair {
	int mine;	/* goes into the channel */
	int peer;	/* an ordinary blocking socket */
	int handle;
};

/* @buffers: bytes of the buffers between them, 0: the kernel's default. */
static struct pair make_pair(int listener, int buffers)
{
	struct timeval limit = { SOON / 1000, 0 };
	struct pair p = { .peer = tcp_socket(), .handle = -1 };

	if (buffers)
		MUST(setsockopt(p.peer, SOL_SOCKET, SO_RCVBUF, &buffers, sizeof(buffers)));
	connected_from(p.peer, listener);
	MUST(setsockopt(p.peer, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)));
	p.mine = MUST(accept4(listener, NULL, NULL, SOCK_CLOEXEC));
	if (buffers)
		MUST(setsockopt(p.mine, SOL_SOCKET, SO_SNDBUF, &buffers, sizeof(buffers)));
	return p;
}

static struct pair tcp_pair(int buffers)
{
	int listener = listening();
	struct pair p = make_pair(listener, buffers);

	close(listener);
	return p;
}

static void end_pair(struct pair *p)
{
	close(p->mine);
	close(p->peer);
}

static void peer_sends(const struct pair *p, const char *text)
{
	EXPECT(send(p->peer, text, strlen(text), MSG_NOSIGNAL), strlen(text));
}

static void peer_gets(const struct pair *p, const char *text)
{
	char buffer[64];
	size_t size = strlen(text);

	EXPECT(minus_errno(recv(p->peer, buffer, size, MSG_WAITALL)), size);
	TRUE(!memcmp(buffer, text, size));
}

/* The other side has ended: end of file, or a reset. */
static void peer_sees_end(int fd)
{
	char byte;
	int ret = minus_errno(recv(fd, &byte, 1, 0));

	if (ret != 0 && ret != -ECONNRESET)
		fail("expected the connection to have ended, recv() gave %s", show(ret));
}

static void peer_sees_life(int fd)
{
	char byte;

	EXPECT(minus_errno(recv(fd, &byte, 1, MSG_DONTWAIT)), -EAGAIN);
}

static char pattern(size_t at)
{
	return at * 31 + (at >> 8);
}

static char *make_pattern(size_t size)
{
	char *data = malloc(size);

	TRUE(data);
	for (size_t i = 0; i < size; i++)
		data[i] = pattern(i);
	return data;
}

/* --- channels through the library ------------------------------------------------- */

static struct mp_channel *channel_of(unsigned int requests, unsigned int completions)
{
	struct mp_options options = {
		.flags = batch ? MP_BATCH : 0,
		.requests = requests,
		.completions = completions,
	};
	struct mp_channel *ch = mp_create(&options);

	if (!ch)
		fail("mp_create: %s", strerror(errno));
	return ch;
}

static struct mp_channel *channel(void)
{
	return channel_of(0, 0);
}

static struct mp_event next(struct mp_channel *ch)
{
	struct mp_event event;
	int ret = mp_dispatch(ch, &event, SOON);

	if (ret == 0)
		fail("expected an event, none came");
	if (ret < 0)
		fail("expected an event, mp_dispatch() gave %s", show(ret));
	return event;
}

static const char *op_name(unsigned int op)
{
	static const char *const names[] = {
		"register", "unregister", "accept", "read", "write", "writev", "disconnect",
	};

	return op < MP_NR_OPS ? names[op] : "?";
}

static struct mp_event want_at(int line, struct mp_channel *ch, int handle, unsigned int op,
			       int result)
{
	struct mp_event e = next(ch);

	if (e.handle != handle || e.op != op || e.result != result)
		fail("line %d: expected %s on handle %d with %s, came %s on %d with %s", line,
		     op_name(op), handle, show(result), op_name(e.op), e.handle, show(e.result));
	return e;
}

#define WANT(ch, handle, op, result)	want_at(__LINE__, ch, handle, op, result)

static void nothing_at(int line, struct mp_channel *ch)
{
	struct mp_event e;
	int ret = mp_dispatch(ch, &e, NEVER);

	if (ret < 0)
		fail("line %d: expected no event, mp_dispatch() gave %s", line, show(ret));
	if (ret)
		fail("line %d: expected no event, came %s on handle %d with %s", line,
		     op_name(e.op), e.handle, show(e.result));
}

#define NOTHING(ch)	nothing_at(__LINE__, ch)

/* The same, and the kernel does not pass the time with looking again and again. */
static void sleeps_at(int line, struct mp_channel *ch)
{
	enum { WHILE = 300 };
	struct rusage before, after;
	struct mp_event e;
	int used;

	MUST(getrusage(RUSAGE_THREAD, &before));
	EXPECT(mp_dispatch(ch, &e, WHILE), 0);
	MUST(getrusage(RUSAGE_THREAD, &after));
	used = (after.ru_stime.tv_sec - before.ru_stime.tv_sec) * 1000 +
	       (after.ru_stime.tv_usec - before.ru_stime.tv_usec) / 1000;
	if (used > WHILE / 2)
		fail("line %d: expected the thread to sleep %d ms, it was busy for %d of them",
		     line, WHILE, used);
}

#define SLEEPS(ch)	sleeps_at(__LINE__, ch)

static int add(struct mp_channel *ch, int fd)
{
	int handle = mp_register(ch, fd, NULL, NULL, 0);

	if (handle < 0)
		fail("mp_register() gave %s", show(handle));
	return handle;
}

static struct pair added_pair(struct mp_channel *ch, int buffers)
{
	struct pair p = tcp_pair(buffers);

	p.handle = add(ch, p.mine);
	return p;
}

/* The channel works, whatever has been done to it. */
static void still_works(struct mp_channel *ch)
{
	struct pair p = added_pair(ch, 0);
	char buffer[8];

	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	peer_sends(&p, "ping");
	WANT(ch, p.handle, MP_OP_READ, 4);
	EXPECT(mp_write(ch, p.handle, buffer, 4), 0);
	WANT(ch, p.handle, MP_OP_WRITE, 4);
	peer_gets(&p, "ping");
	EXPECT(mp_unregister(ch, p.handle), 0);
	EXPECT(mp_flush(ch), 0);
	end_pair(&p);
}

/* --- channels below the library ---------------------------------------------------- */

struct raw {
	int fd;
	struct mp_create args;
	struct mp_shared *shared;
	struct mp_request *sq;
	struct mp_completion *cq;
	uint32_t sq_tail;
	uint32_t cq_head;
};

#define SIZES(requests, completions) .sq_entries = (requests), .cq_entries = (completions)

static int device(void)
{
	return MUST(open("/dev/megapipe", O_RDWR | O_CLOEXEC));
}

static int raw_create(struct mp_create *args)
{
	int fd = device();
	int ret = minus_errno(ioctl(fd, MP_IOC_CREATE, args));

	close(fd);
	return ret;
}

static struct raw raw_channel(uint32_t sq_entries, uint32_t cq_entries)
{
	struct raw r = { .args = { SIZES(sq_entries, cq_entries),
					.flags = batch ? MP_BATCH : 0 } };
	void *memory;

	r.fd = raw_create(&r.args);
	if (r.fd < 0)
		fail("MP_IOC_CREATE: %s", strerror(-r.fd));
	memory = mmap(NULL, r.args.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, r.fd, 0);
	TRUE(memory != MAP_FAILED);
	r.shared = memory;
	r.sq = (void *)((char *)memory + r.args.sq_offset);
	r.cq = (void *)((char *)memory + r.args.cq_offset);
	return r;
}

static void raw_close(struct raw *r)
{
	MUST(munmap(r->shared, r->args.bytes));
	MUST(close(r->fd));
}

static int enter(int fd, unsigned long flags)
{
	return minus_errno(ioctl(fd, MP_IOC_ENTER, flags));
}

static int raw_wait(struct raw *r, unsigned long flags, int64_t timeout_ns)
{
	r->shared->timeout_ns = timeout_ns;
	return enter(r->fd, flags | MP_ENTER_WAIT);
}

static void raw_put(struct raw *r, struct mp_request request)
{
	r->sq[r->sq_tail & (r->args.sq_entries - 1)] = request;
	__atomic_store_n(&r->shared->sq_tail, ++r->sq_tail, __ATOMIC_RELEASE);
}

static unsigned int raw_waiting(const struct raw *r)
{
	return __atomic_load_n(&r->shared->cq_tail, __ATOMIC_ACQUIRE) - r->cq_head;
}

static struct mp_completion raw_take(struct raw *r)
{
	struct mp_completion c = r->cq[r->cq_head & (r->args.cq_entries - 1)];

	__atomic_store_n(&r->shared->cq_head, ++r->cq_head, __ATOMIC_RELEASE);
	if (c.reserved || c.reserved2)
		fail("expected the reserved fields of a completion to be 0");
	return c;
}

/* Send one request down that completes at once. */
static struct mp_completion raw_do(struct raw *r, struct mp_request request)
{
	struct mp_completion c;

	raw_put(r, request);
	EXPECT(enter(r->fd, MP_ENTER_SUBMIT), 1);
	EXPECT(raw_waiting(r), 1);
	c = raw_take(r);
	if (c.op != request.op || c.handle != request.handle)
		fail("expected the completion of %u on handle %u, came %u on %u", request.op,
		     request.handle, c.op, c.handle);
	return c;
}

/* The same for one that stays pending, or has nothing to say. */
static void raw_begin(struct raw *r, struct mp_request request)
{
	raw_put(r, request);
	EXPECT(enter(r->fd, MP_ENTER_SUBMIT), 1);
	EXPECT(raw_waiting(r), 0);
}

static void raw_register(struct raw *r, uint32_t handle, int fd)
{
	raw_begin(r, (struct mp_request){ .op = MP_OP_REGISTER, .handle = handle, .fd = fd });
}

static struct mp_completion raw_next(struct raw *r)
{
	if (!raw_waiting(r))
		EXPECT(raw_wait(r, 0, SOON * 1000000LL), 0);
	if (!raw_waiting(r))
		fail("expected a completion, none came");
	return raw_take(r);
}

/* --- threads and children ------------------------------------------------------------ */

static pthread_t start(void *(*run)(void *), void *argument)
{
	pthread_t thread;
	int ret = pthread_create(&thread, NULL, run, argument);

	if (ret)
		fail("pthread_create: %s", strerror(ret));
	return thread;
}

static void join(pthread_t thread)
{
	EXPECT(pthread_join(thread, NULL), 0);
}

/* Returns 0 in the child. */
static pid_t child(void)
{
	pid_t pid = MUST(fork());

	if (!pid)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return pid;
}

static int status_of(pid_t pid)
{
	int status;

	while (waitpid(pid, &status, 0) < 0)
		TRUE(errno == EINTR);
	return status;
}

/* The child must have found everything right; it reports by itself if not. */
static void child_ends_well(pid_t pid)
{
	int status = status_of(pid);

	if (WIFEXITED(status) && WEXITSTATUS(status) == 1)
		_exit(1);
	if (status)
		fail("expected a child to end well, its wait status is %#x", status);
}

static int open_descriptors(void)
{
	int count = 0;

	for (int fd = 0; fd < 2048; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static void interrupt(int number)
{
	(void)number;
}

/* Signal this process after @ms, and, if @again, each @ms. */
static void set_timer(int ms, bool again)
{
	struct timeval t = { ms / 1000, ms % 1000 * 1000 };
	struct itimerval timer = { .it_value = t };
	struct sigaction action = { .sa_handler = interrupt };

	if (again) {
		timer.it_interval = t;
		action.sa_flags = SA_RESTART;	/* crossings return -EINTR all the same */
	}
	MUST(sigaction(SIGALRM, &action, NULL));
	MUST(setitimer(ITIMER_REAL, &timer, NULL));
}

/* --- the calls, used as intended ------------------------------------------------------ */

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
	char buffer[16] = "";

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
	struct pair p = added_pair(ch, 0);
	char buffer[16];

	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	close(p.peer);
	WANT(ch, p.handle, MP_OP_READ, -ECONNRESET);
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	WANT(ch, p.handle, MP_OP_READ, 0);
	EXPECT(mp_write(ch, p.handle, buffer, 1), 0);
	WANT(ch, p.handle, MP_OP_WRITE, -EPIPE);
	mp_close(ch);
	close(p.mine);
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

struct slow_reader {
	int fd;
	size_t size;
};

static void *read_slowly(void *argument)
{
	struct slow_reader *r = argument;
	char buffer[8192];
	size_t at = 0;

	while (at < r->size) {
		ssize_t n = recv(r->fd, buffer, sizeof(buffer), 0);

		if (n <= 0)
			fail("expected %zu bytes, the connection ended after %zu", r->size, at);
		for (ssize_t i = 0; i < n; i++)
			if (buffer[i] != pattern(at + i))
				fail("byte %zu of the stream is wrong", at + i);
		at += n;
		sched_yield();
	}
	return NULL;
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
		sleep_ms(0);
		NOTHING(ch);
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
	if (mp_dispatch(ch, &e, NEVER)) {
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

/* --- small rings --------------------------------------------------------------------- */

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
		got += mp_dispatch(ch, &e, NEVER);
		got += mp_dispatch(other, &e, 0);
	}
	EXPECT(got, 1);
	peer_sends(&p, "bc");
	while (got < 3) {
		got += mp_dispatch(ch, &e, NEVER);
		got += mp_dispatch(other, &e, 0);
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

/* Two pages, of which the second cannot be used. */
static char *half_page(int protection)
{
	char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	TRUE(page != MAP_FAILED);
	MUST(mprotect(page + 4096, 4096, protection));
	return page;
}

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
		if (mp_dispatch(ch, &e, NEVER) == 0) {
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
		if (!mp_dispatch(ch, &e, 0)) {
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

/* --- other threads, other processes ---------------------------------------------------- */

static void *foreign_library(void *argument)
{
	struct mp_event e;

	EXPECT(mp_dispatch(argument, &e, 0), -EPERM);
	EXPECT(mp_dispatch(argument, &e, -1), -EPERM);
	return NULL;
}

static void *foreign_raw(void *argument)
{
	struct raw *r = argument;

	EXPECT(enter(r->fd, 0), -EPERM);
	EXPECT(enter(r->fd, MP_ENTER_SUBMIT), -EPERM);
	EXPECT(enter(r->fd, MP_ENTER_WAIT), -EPERM);
	EXPECT(enter(r->fd, -1), -EPERM);
	/* The memory is the process's, not the thread's. */
	EXPECT(r->shared->sq_head, r->sq_tail);
	return NULL;
}

static void test_foreign_thread(void)
{
	struct mp_channel *ch = channel();
	struct raw r = raw_channel(4, 4);

	join(start(foreign_library, ch));
	still_works(ch);
	join(start(foreign_raw, &r));
	EXPECT(raw_do(&r, (struct mp_request){ .op = MP_OP_READ }).result, -ENOENT);
	raw_close(&r);
	mp_close(ch);
}

static void *make_and_leave(void *argument)
{
	struct pair *p = argument;
	static struct raw r;
	static char buffer;

	r = raw_channel(4, 4);
	raw_register(&r, 0, p->mine);
	raw_begin(&r, (struct mp_request){
		.op = MP_OP_READ, .addr = (uintptr_t)&buffer, .len = 1 });
	return &r;
}

/* A channel whose thread is gone belongs to nobody, and still ends in order. */
static void test_owner_gone(void)
{
	struct pair p = tcp_pair(0);
	pthread_t thread = start(make_and_leave, &p);
	struct raw *r;
	void *ret;

	EXPECT(pthread_join(thread, &ret), 0);
	r = ret;
	sleep_ms(10);
	peer_sends(&p, "x");
	for (int i = 0; i < 20; i++)
		join(start(foreign_raw, r));
	close(p.mine);
	peer_sees_life(p.peer);
	raw_close(r);
	peer_sees_end(p.peer);
	close(p.peer);
}

static void *close_under(void *argument)
{
	struct raw *r = argument;

	sleep_ms(50);
	MUST(munmap(r->shared, r->args.bytes));
	MUST(close(r->fd));
	return NULL;
}

/* Another thread closes the channel in which its owner sleeps. */
static void test_close_under_owner(void)
{
	struct raw r = raw_channel(4, 4);
	struct pair p = tcp_pair(0);
	pthread_t thread;
	char buffer;

	raw_register(&r, 0, p.mine);
	raw_begin(&r, (struct mp_request){
		.op = MP_OP_READ, .addr = (uintptr_t)&buffer, .len = 1 });
	close(p.mine);
	thread = start(close_under, &r);
	EXPECT(raw_wait(&r, 0, 150000000), 0);
	join(thread);
	EXPECT(enter(r.fd, 0), -EBADF);
	peer_sees_end(p.peer);
	close(p.peer);
}

static void test_fork(void)
{
	struct raw r = raw_channel(4, 4);
	struct pair p = tcp_pair(0);
	pid_t pid, touch;
	int ready[2];
	char byte;

	raw_register(&r, 0, p.mine);
	MUST(pipe(ready));
	pid = child();
	if (!pid) {
		EXPECT(minus_errno(fcntl(r.fd, F_GETFD)), -EBADF);
		EXPECT(enter(r.fd, 0), -EBADF);
		EXPECT(minus_errno(ioctl(r.fd, MP_IOC_CREATE, &r.args)), -EBADF);
		touch = MUST(fork());
		if (!touch)
			_exit(*(volatile uint32_t *)&r.shared->sq_head + 100);
		EXPECT(WTERMSIG(status_of(touch)), SIGSEGV);
		/* Its number is free for others. */
		EXPECT(dup2(0, r.fd), r.fd);
		close(r.fd);
		close(p.mine);
		close(p.peer);
		MUST(write(ready[1], "", 1));
		pause();
	}
	MUST(close(ready[1]));
	if (read(ready[0], &byte, 1) == 1) {
		/* The child lives; the channel and its connection end all the same. */
		close(p.mine);
		peer_sees_life(p.peer);
		raw_close(&r);
		peer_sees_end(p.peer);
		MUST(kill(pid, SIGKILL));
		status_of(pid);
	} else {
		child_ends_well(pid);
	}
	close(p.peer);
}

/* A child that tidies up must not end its parent's channel, nor anything of its own. */
static void test_fork_closes(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	char buffer[8];
	pid_t pid;
	int fds;

	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	pid = child();
	if (!pid) {
		while (open_descriptors() < 20)
			MUST(open("/dev/null", O_RDONLY));
		fds = open_descriptors();
		mp_close(ch);
		EXPECT(open_descriptors(), fds);
		_exit(0);
	}
	child_ends_well(pid);
	peer_sends(&p, "x");
	WANT(ch, p.handle, MP_OP_READ, 1);
	still_works(ch);
	mp_close(ch);
	end_pair(&p);
}

static void *unshare_files(void *argument)
{
	struct raw r = raw_channel(4, 4);

	(void)argument;
	EXPECT(enter(r.fd, 0), 0);
	MUST(unshare(CLONE_FILES));
	EXPECT(enter(r.fd, 0), -EBADF);
	return NULL;
}

static void test_unshare(void)
{
	join(start(unshare_files, NULL));
}

static int send_descriptor(int over, int fd)
{
	char byte = 0, control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec part = { &byte, 1 };
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(int));
	return minus_errno(sendmsg(over, &message, 0));
}

/* Not over a UNIX socket; whoever may trace its maker gets hold of it all the same. */
static void test_descriptor_passed(void)
{
	int listener = listening(), over[2], fd, peer, pidfd;
	pid_t maker;

	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, over));
	peer = connected(listener);
	maker = child();
	if (!maker) {
		struct raw r = raw_channel(8, 8);
		int mine = MUST(accept(listener, NULL, NULL));

		close(peer);
		raw_register(&r, 0, mine);
		EXPECT(send_descriptor(over[1], r.fd), -EINVAL);
		EXPECT(send_descriptor(over[1], mine), 1);
		EXPECT(write(over[1], &r.fd, sizeof(r.fd)), sizeof(r.fd));
		pause();
	}
	EXPECT(recv(over[0], &fd, 1, 0), 1);
	EXPECT(read(over[0], &fd, sizeof(fd)), sizeof(fd));
	pidfd = MUST(syscall(SYS_pidfd_open, maker, 0));
	fd = MUST(syscall(SYS_pidfd_getfd, pidfd, fd, 0));
	close(pidfd);
	EXPECT(enter(fd, 0), -EPERM);
	EXPECT(enter(fd, MP_ENTER_SUBMIT | MP_ENTER_WAIT), -EPERM);
	TRUE(mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED);
	EXPECT(errno, EPERM);
	/* Its maker is killed; the channel is there as long as someone has it. */
	MUST(kill(maker, SIGKILL));
	status_of(maker);
	sleep_ms(10);
	EXPECT(enter(fd, 0), -EPERM);
	EXPECT(send(peer, "x", 1, MSG_NOSIGNAL), 1);
	peer_sees_life(peer);
	close(fd);
	peer_sees_end(peer);
	close(peer);
	close(listener);
}

/* What the program finds that --exec-child starts again; @want is for the crossing. */
static int exec_child(char **arguments)
{
	int fd = atoi(arguments[0]), want = atoi(arguments[2]);

	report_fd = atoi(arguments[1]);
	EXPECT(enter(fd, 0), want);
	EXPECT(enter(fd, MP_ENTER_SUBMIT | MP_ENTER_WAIT), want);
	TRUE(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
	EXPECT(-errno, want);
	return 0;
}

static void test_exec(void)
{
	for (int keep = 0; keep < 2; keep++) {
		char numbers[3][16];
		pid_t pid = child();
		struct raw r;

		if (pid) {
			child_ends_well(pid);
			continue;
		}
		r = raw_channel(64, 32);
		EXPECT(MUST(fcntl(r.fd, F_GETFD)), FD_CLOEXEC);
		if (keep)
			MUST(fcntl(r.fd, F_SETFD, 0));
		snprintf(numbers[0], 16, "%d", r.fd);
		snprintf(numbers[1], 16, "%d", (int)MUST(dup(report_fd)));
		snprintf(numbers[2], 16, "%d", keep ? -EPERM : -EBADF);
		execl("/proc/self/exe", "mp-test", "--exec-child", numbers[0], numbers[1],
		      numbers[2], NULL);
		fail("execl: %s", strerror(errno));
	}
}

/* --- attacks below the library ----------------------------------------------------------- */

static void test_ioctls(void)
{
	struct raw r = raw_channel(4, 4);
	struct mp_create args = { SIZES(4, 4) }, *constant;
	int fd = device(), before = open_descriptors();
	struct pollfd poll_fd = { .fd = r.fd, .events = POLLIN };
	char buffer[8];

	EXPECT(enter(fd, 0), -ENOTTY);
	EXPECT(minus_errno(ioctl(r.fd, MP_IOC_CREATE, &args)), -ENOTTY);
	EXPECT(minus_errno(ioctl(r.fd, 0, 0)), -ENOTTY);
	EXPECT(minus_errno(ioctl(r.fd, MP_IOC_ENTER + 1, 0)), -ENOTTY);
	EXPECT(minus_errno(ioctl(r.fd, MP_IOC_ENTER | 0xffff0000, 0)), -ENOTTY);
	EXPECT(minus_errno(ioctl(fd, _IOWR('p', 0xe0, int), &args)), -ENOTTY);
	EXPECT(minus_errno(ioctl(fd, 0xffffffff, &args)), -ENOTTY);
	for (int bit = 2; bit < 64; bit++)
		EXPECT(enter(r.fd, 1UL << bit), -EINVAL);
	EXPECT(enter(r.fd, -1), -EINVAL);
	EXPECT(enter(r.fd, 0), 0);
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 0);

	EXPECT(minus_errno(ioctl(fd, MP_IOC_CREATE, NULL)), -EFAULT);
	EXPECT(minus_errno(ioctl(fd, MP_IOC_CREATE, KERNEL_ADDRESS)), -EFAULT);
	EXPECT(minus_errno(ioctl(fd, MP_IOC_CREATE, half_page(PROT_NONE) + 4090)), -EFAULT);
	constant = (void *)half_page(PROT_READ | PROT_WRITE);
	*constant = args;
	MUST(mprotect(constant, 4096, PROT_READ));
	EXPECT(minus_errno(ioctl(fd, MP_IOC_CREATE, constant)), -EFAULT);
	EXPECT(open_descriptors(), before);

	EXPECT(minus_errno(read(r.fd, buffer, 1)), -EINVAL);
	EXPECT(minus_errno(write(r.fd, buffer, 1)), -EINVAL);
	EXPECT(minus_errno(read(fd, buffer, 1)), -EINVAL);
	lseek(r.fd, 1000, SEEK_SET);
	EXPECT(minus_errno(ftruncate(r.fd, 0)), -EINVAL);
	poll(&poll_fd, 1, 0);
	raw_close(&r);
	close(fd);
}

static void test_create_raw(void)
{
	const struct mp_create bad[] = {
		{ SIZES(0, 4) }, { SIZES(4, 0) }, { SIZES(3, 4) }, { SIZES(4, 3) },
		{ SIZES(MP_MAX_ENTRIES * 2, 4) }, { SIZES(4, MP_MAX_ENTRIES * 2) },
		{ SIZES(1U << 31, 1U << 31) }, { SIZES(UINT32_MAX, 4) },
		{ SIZES(4, 4), .flags = 1U << 31 }, { SIZES(4, 4), .flags = UINT32_MAX },
		{ SIZES(4, 4), .reserved = 1 },
	};
	struct rlimit limit, none = { 0, 0 };
	struct mp_create args = { SIZES(4, 4) };
	int fd = device(), before = open_descriptors();

	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		args = bad[i];
		EXPECT(minus_errno(ioctl(fd, MP_IOC_CREATE, &args)), -EINVAL);
	}
	MUST(getrlimit(RLIMIT_NOFILE, &limit));
	none.rlim_max = limit.rlim_max;
	MUST(setrlimit(RLIMIT_NOFILE, &none));
	for (int i = 0; i < 20; i++) {
		args = (struct mp_create){ SIZES(4, 4) };
		EXPECT(minus_errno(ioctl(fd, MP_IOC_CREATE, &args)), -EMFILE);
	}
	MUST(setrlimit(RLIMIT_NOFILE, &limit));
	EXPECT(open_descriptors(), before);
	/* Fields that go out are not looked at on the way in. */
	args = (struct mp_create){
		SIZES(4, 4), .bytes = 1, .sq_offset = 2, .cq_offset = UINT64_MAX };
	close(MUST(ioctl(fd, MP_IOC_CREATE, &args)));
	TRUE(args.bytes % 4096 == 0 && args.cq_offset + 4 * 32 <= args.bytes);
	close(fd);
}

static void refuse_map(int line, const struct raw *r, size_t bytes, int flags, off_t offset,
		       int want)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, r->fd, offset);
	int came = memory == MAP_FAILED ? -errno : 0;

	if (came != want)
		fail("line %d: mmap of %zu bytes at %ld: expected %s, came %s", line, bytes,
		     (long)offset, show(want), show(came));
}

static void test_mmap(void)
{
	struct raw r = raw_channel(256, 256);
	size_t bytes = r.args.bytes;
	char *second, *moved;

	refuse_map(__LINE__, &r, bytes - 4096, MAP_SHARED, 0, -EINVAL);
	refuse_map(__LINE__, &r, bytes + 4096, MAP_SHARED, 0, -EINVAL);
	refuse_map(__LINE__, &r, 1UL << 40, MAP_SHARED, 0, -EINVAL);
	refuse_map(__LINE__, &r, bytes, MAP_SHARED, 4096, -EINVAL);
	refuse_map(__LINE__, &r, bytes, MAP_SHARED, bytes, -EINVAL);
	refuse_map(__LINE__, &r, bytes, MAP_SHARED, 1L << 50, -EINVAL);
	refuse_map(__LINE__, &r, bytes, MAP_PRIVATE, 0, -EINVAL);

	/* A second view shows the same memory. */
	second = mmap(NULL, bytes, PROT_READ, MAP_SHARED, r.fd, 0);
	TRUE(second != MAP_FAILED);
	r.shared->reserved[3] = 0x1234;
	EXPECT(((struct mp_shared *)second)->reserved[3], 0x1234);
	TRUE(mremap(second, bytes, 2 * bytes, MREMAP_MAYMOVE) == MAP_FAILED);
	TRUE(mremap(second, 0, bytes, MREMAP_MAYMOVE) == MAP_FAILED);
	moved = mremap(second, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
		       half_page(PROT_NONE) - 64 * 4096);
	if (moved != MAP_FAILED)
		EXPECT(((struct mp_shared *)moved)->reserved[3], 0x1234);
	else
		moved = second;
	madvise(moved, bytes, MADV_DONTNEED);
	madvise(moved, bytes, MADV_REMOVE);
	mprotect(moved, bytes, PROT_READ | PROT_WRITE);
	mlock(moved, bytes);
	EXPECT(munmap(moved + 4096, 4096), 0);
	EXPECT(raw_do(&r, (struct mp_request){ .op = MP_OP_READ }).result, -ENOENT);

	/* The kernel has its own way to the rings. */
	r.shared->sq_tail++;
	r.sq[r.sq_tail & 255].op = 200;
	r.shared->timeout_ns = 0;
	EXPECT(munmap(r.shared, bytes), 0);
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT | MP_ENTER_WAIT), 1);
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT | MP_ENTER_WAIT), 0);
	r.shared = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, r.fd, 0);
	TRUE((void *)r.shared != MAP_FAILED);
	EXPECT(r.shared->sq_head, 2);
	EXPECT(r.shared->cq_tail, 2);
	raw_close(&r);
}

static void test_indices(void)
{
	struct raw r = raw_channel(4, 4);
	const uint32_t bad[] = { 5, 6, 100, 1U << 31, UINT32_MAX, UINT32_MAX - 3 };
	struct mp_request wrong = { .op = 99, .handle = 5, .cookie = 77 };

	/* Nothing is in the rings: sq_tail may be 0 to 4 ahead, cq_head 0 to 4 behind. */
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		for (unsigned long flags = 0; flags < 4; flags++) {
			r.shared->timeout_ns = -1;
			r.shared->sq_tail = bad[i];
			EXPECT(enter(r.fd, flags), -EBADMSG);
			r.shared->sq_tail = 0;
			r.shared->cq_head = -bad[i];
			EXPECT(enter(r.fd, flags), -EBADMSG);
			r.shared->cq_head = 1;
			EXPECT(enter(r.fd, flags), -EBADMSG);
			r.shared->cq_head = 0;
		}
	}
	/* No harm done. */
	EXPECT(raw_do(&r, wrong).result, -EINVAL);
	/* The kernel does not believe its own copies. */
	for (int i = 0; i < 50; i++) {
		r.shared->sq_head = 0x55555555U * i;
		r.shared->cq_tail = 0x33333333U * i;
		r.shared->reserved2[i % 7] = -1;
		raw_put(&r, wrong);
		EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 1);
		EXPECT(raw_take(&r).cookie, 77);
	}
	EXPECT(r.shared->sq_head, r.sq_tail);
	EXPECT(r.shared->cq_tail, r.cq_head);
	/* Untaken: up to 4 in the ring, and back again. */
	for (int i = 0; i < 4; i++) {
		raw_put(&r, wrong);
		EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 1);
	}
	raw_put(&r, wrong);
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 0);
	r.shared->cq_head = r.cq_head - 1;
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT), -EBADMSG);
	r.shared->cq_head = r.cq_head + 5;
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT), -EBADMSG);
	r.shared->cq_head = r.cq_head + 4;
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 1);
	raw_close(&r);
}

static void test_requests(void)
{
	struct raw r = raw_channel(4, 4);
	struct pair p = tcp_pair(0);
	int listener = listening();
	static char buffer[8];
	const struct mp_request good[] = {
		{ .op = MP_OP_UNREGISTER }, { .op = MP_OP_ACCEPT, .len = 1 },
		{ .op = MP_OP_READ, .addr = (uintptr_t)buffer, .len = 1 },
		{ .op = MP_OP_WRITE, .addr = (uintptr_t)buffer, .len = 1 },
		{ .op = MP_OP_WRITEV, .addr = (uintptr_t)buffer, .len = 0 },
		{ .op = MP_OP_DISCONNECT },
		{ .op = MP_OP_CONVERT },
	};
	const int allowed[] = {
		0, MP_ACCEPT_LWSOCKET, MP_AT_OFFSET, MP_AT_OFFSET, MP_AT_OFFSET, 0, 0
	};
	struct mp_request bad;

	for (unsigned int op = MP_NR_OPS; op < 256; op++)
		EXPECT(raw_do(&r, (struct mp_request){ .op = op, .handle = ~op }).result, -EINVAL);
	raw_register(&r, 0, p.mine);
	for (size_t i = 0; i < sizeof(good) / sizeof(*good); i++) {
		for (int bit = 0; bit < 24; bit++) {
			bad = good[i];
			if (bit < 8 && 1 << bit == allowed[i])
				continue;
			if (bit < 8)
				bad.flags = 1 << bit;
			else
				bad.reserved = 1 << (bit - 8);
			EXPECT(raw_do(&r, bad).result, -EINVAL);
		}
		bad = good[i];
		bad.cookie = 1;
		EXPECT(raw_do(&r, bad).result, -EINVAL);
		bad = good[i];
		bad.fd = -1;
		EXPECT(raw_do(&r, bad).result, -EINVAL);
		bad = good[i];
		if (!bad.addr && bad.op != MP_OP_WRITEV) {
			bad.addr = 1;
			EXPECT(raw_do(&r, bad).result, -EINVAL);
		}
		bad = good[i];
		if (bad.op == MP_OP_UNREGISTER || bad.op >= MP_OP_DISCONNECT) {
			bad.len = 1;
			EXPECT(raw_do(&r, bad).result, -EINVAL);
		}
		bad = good[i];
		for (uint32_t handle = 1; handle; handle <<= 1) {
			bad.handle = handle;
			EXPECT(raw_do(&r, bad).result, -ENOENT);
		}
	}
	bad = (struct mp_request){ .op = MP_OP_REGISTER, .fd = p.mine, .cookie = 0x1234 };
	EXPECT(raw_do(&r, bad).result, -EEXIST);
	bad.handle = MP_MAX_HANDLES;
	EXPECT(raw_do(&r, bad).result, -EINVAL);
	bad.handle = UINT32_MAX;
	EXPECT(raw_do(&r, bad).cookie, 0x1234);
	bad.handle = 1;
	bad.flags = 1;
	EXPECT(raw_do(&r, bad).result, -EINVAL);
	/* The highest number. */
	raw_register(&r, MP_MAX_HANDLES - 1, listener);
	EXPECT(raw_do(&r, (struct mp_request){ .op = MP_OP_UNREGISTER,
					       .handle = MP_MAX_HANDLES - 1 }).result, 0);
	/* Reading into the rings themselves is a strange wish, no more. */
	peer_sends(&p, "abcdefghabcdefgh");
	bad = (struct mp_request){
		.op = MP_OP_READ, .addr = (uintptr_t)r.sq, .len = 32 };
	EXPECT(raw_do(&r, bad).result, 16);
	raw_close(&r);
	end_pair(&p);
	close(listener);
}

static void test_wait_raw(void)
{
	struct raw r = raw_channel(4, 4);
	const int64_t soon[] = { 0, 1, 999, 1000000 };
	const int64_t later[] = { -1, INT64_MIN, INT64_MAX, INT64_MAX - 1, 1LL << 62 };

	for (size_t i = 0; i < sizeof(soon) / sizeof(*soon); i++)
		EXPECT(raw_wait(&r, 0, soon[i]), 0);
	for (size_t i = 0; i < sizeof(later) / sizeof(*later); i++) {
		set_timer(20, false);
		EXPECT(raw_wait(&r, 0, later[i]), -EINTR);
	}
	raw_close(&r);
}

/* What random requests act on. Its handles are 0 .. ENDS - 1, with gaps. */
enum { ENDS = 16, LISTENERS = 4 };

struct arena {
	struct raw r;
	int ends[ENDS];
	int peers[ENDS];
	char *memory;		/* requests may do to it what they like */
	uint32_t sq_head;	/* the kernel's: known from what crossings return */
	uint32_t cq_head;	/* one that the kernel has accepted */
	unsigned int refused, done;
	atomic_bool over;
};

enum { ARENA_MEMORY = 1 << 16 };

static uint64_t random_address(struct arena *a, uint64_t *seed)
{
	switch (random_next(seed) % 8) {
	case 0:
		return 0;
	case 1:
		return random_next(seed);
	case 2:
		return (uintptr_t)KERNEL_ADDRESS + random_next(seed) % 4096;
	case 3:
		return (uintptr_t)a->r.shared + random_next(seed) % a->r.args.bytes;
	default:
		return (uintptr_t)a->memory + random_next(seed) % ARENA_MEMORY;
	}
}

static struct mp_request random_request(struct arena *a, uint64_t *seed)
{
	struct mp_request q = {
		.op = random_next(seed) % MP_NR_OPS,
		.handle = random_next(seed) % (ENDS + 2),
	};

	if (q.op != MP_OP_UNREGISTER && q.op != MP_OP_DISCONNECT)
		q.len = random_next(seed) % 4 ? random_next(seed) % 3 : random_next(seed);
	if (q.op == MP_OP_REGISTER) {
		q.fd = a->ends[random_next(seed) % ENDS];
		q.cookie = random_next(seed);
		if (random_next(seed) % 8)
			q.len = 0;
	}
	if (q.op >= MP_OP_READ && q.op <= MP_OP_WRITEV)
		q.addr = random_address(a, seed);
	/* Resets and unregistrations must not win, or nothing else happens. */
	if ((q.op == MP_OP_DISCONNECT || q.op == MP_OP_UNREGISTER) && random_next(seed) % 8)
		q.op = MP_OP_REGISTER;
	switch (random_next(seed) % 64) {
	case 0:
		q.flags = random_next(seed);
		break;
	case 1:
		q.reserved = random_next(seed);
		break;
	case 2:
		q.fd = random_next(seed);
		break;
	case 3:
		q.handle = random_next(seed);
		break;
	case 4:
		q.op = random_next(seed);
		break;
	case 5:
		q.cookie = random_next(seed);
		break;
	}
	return q;
}

static void arena_fill(struct arena *a, int end)
{
	struct pair p;

	if (end < LISTENERS) {
		a->ends[end] = listening();
		MUST(fcntl(a->ends[end], F_SETFL, O_NONBLOCK));
		a->peers[end] = connected(a->ends[end]);
		return;
	}
	p = tcp_pair(end % 2 ? 4096 : 0);
	a->ends[end] = p.mine;
	a->peers[end] = p.peer;
}

static void arena_make(struct arena *a)
{
	char *memory;

	*a = (struct arena){ .r = raw_channel(16, 16) };
	/* A gap ends what is read into the memory, and another one what is read into the rings. */
	memory = mmap(NULL, 2 * ARENA_MEMORY, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TRUE(memory != MAP_FAILED);
	a->memory = memory;
	MUST(mprotect(memory, ARENA_MEMORY, PROT_READ | PROT_WRITE));
	memory = mremap(a->r.shared, a->r.args.bytes, a->r.args.bytes,
			MREMAP_MAYMOVE | MREMAP_FIXED, memory + ARENA_MEMORY + 4096);
	TRUE(memory != MAP_FAILED);
	a->r.shared = (void *)memory;
	a->r.sq = (void *)(memory + a->r.args.sq_offset);
	a->r.cq = (void *)(memory + a->r.args.cq_offset);
	for (int i = 0; i < ENDS; i++)
		arena_fill(a, i);
}

static void arena_end(struct arena *a)
{
	raw_close(&a->r);
	for (int i = 0; i < ENDS; i++) {
		close(a->ends[i]);
		close(a->peers[i]);
	}
	munmap(a->memory, 2 * ARENA_MEMORY);
}

/* Let the peers do something, too. */
static void arena_stir(struct arena *a, uint64_t *seed)
{
	int end = random_next(seed) % ENDS;
	char buffer[512];

	switch (random_next(seed) % 16) {
	case 0:
		if (end >= LISTENERS)
			shutdown(a->peers[end], SHUT_WR);
		break;
	case 1:
		close(a->ends[end]);
		close(a->peers[end]);
		arena_fill(a, end);
		close_range(FIRST_ACCEPTED, ~0U, 0);
		break;
	case 2 ... 7:
		recv(a->peers[end], buffer, sizeof(buffer), MSG_DONTWAIT);
		break;
	default:
		memset(buffer, 0, sizeof(buffer));
		send(a->peers[end], buffer, random_next(seed) % sizeof(buffer),
		     MSG_DONTWAIT | MSG_NOSIGNAL);
	}
}

/* Cross, with indices that the kernel accepts unless somebody overwrites them. */
static void arena_cross(struct arena *a, uint64_t *seed)
{
	struct mp_shared *shared = a->r.shared;
	uint32_t cq_head = __atomic_load_n(&shared->cq_tail, __ATOMIC_ACQUIRE);
	int ret;

	/* Rings are 16 long: what cannot be right is not worth a try. */
	if (cq_head - a->cq_head > 16)
		cq_head = a->cq_head + random_next(seed) % 17;
	__atomic_store_n(&shared->cq_head, cq_head, __ATOMIC_RELEASE);
	__atomic_store_n(&shared->sq_tail, a->sq_head + random_next(seed) % 17, __ATOMIC_RELEASE);
	ret = enter(a->r.fd, MP_ENTER_SUBMIT);
	if (ret == -EBADMSG) {
		/* This one is always right. */
		a->refused++;
		__atomic_store_n(&shared->cq_head, a->cq_head, __ATOMIC_RELEASE);
		__atomic_store_n(&shared->sq_tail, a->sq_head, __ATOMIC_RELEASE);
	} else if (ret < 0 || ret > 16) {
		fail("expected a crossing to take 0 to 16 requests, came %s", show(ret));
	} else {
		a->cq_head = cq_head;
		a->sq_head += ret;
		a->done += ret;
	}
	shared->timeout_ns = random_next(seed) % 4 ? 0 : random_next(seed) % 100000;
	ret = enter(a->r.fd, MP_ENTER_WAIT);
	if (ret == -EBADMSG)
		a->refused++;
	else if (ret != 0 && ret != -EINTR)
		fail("expected a crossing to return 0, -EINTR or -EBADMSG, came %s", show(ret));
}

/* Descriptors that the kernel makes come after all of ours. */
static void reserve_descriptors(void)
{
	struct rlimit limit = { 2048, 2048 };
	int fd;

	MUST(setrlimit(RLIMIT_NOFILE, &limit));
	do {
		fd = MUST(open("/dev/null", O_RDONLY | O_CLOEXEC));
	} while (fd < FIRST_ACCEPTED - 4 * ENDS);
}

static void test_random_requests(void)
{
	struct arena *a = malloc(sizeof(*a));
	uint64_t seed = 0x1234567 + batch;

	reserve_descriptors();
	arena_make(a);
	set_timer(100, true);
	for (int i = 0; i < 1500 * scale; i++) {
		for (int slot = 0; slot < 16; slot++)
			a->r.sq[slot] = random_request(a, &seed);
		arena_cross(a, &seed);
		if (i % 4 == 0)
			arena_stir(a, &seed);
	}
	if (a->refused)
		fail("expected right indices to be accepted, %u crossings were refused",
		     a->refused);
	TRUE(a->done > 100);
	arena_end(a);
	free(a);
}

static void *scribble(void *argument)
{
	struct arena *a = argument;
	uint64_t seed = (uintptr_t)&seed ^ now_ns();
	char *memory = (char *)a->r.shared;

	for (int turn = 0; !atomic_load(&a->over); turn++) {
		for (int i = 0; i < 256; i++) {
			/* Rarely the indices, or no crossing would get beyond them. */
			uint64_t what = random_next(&seed) % (turn % 64 ? 28 : 32);
			struct mp_request *q = &a->r.sq[random_next(&seed) % 16];

			if (what < 24)
				*q = random_request(a, &seed);
			else if (what < 28)
				((volatile char *)q)[random_next(&seed) % 32] = random_next(&seed);
			else if (what < 30)
				((volatile char *)memory)[random_next(&seed) % a->r.args.bytes] =
					random_next(&seed);
			else
				((volatile uint32_t *)memory)[random_next(&seed) % 32] =
					random_next(&seed) % 64;
		}
	}
	return NULL;
}

static void test_scribble(void)
{
	struct arena *a = malloc(sizeof(*a));
	uint64_t seed = 0x7654321 + batch, end = now_ns() + 1500000000ULL * scale;
	pthread_t threads[2];

	reserve_descriptors();
	arena_make(a);
	for (int i = 0; i < 2; i++)
		threads[i] = start(scribble, a);
	/* A time-out that was scribbled over may be long. */
	set_timer(20, true);
	/* A slow kernel gets more time, but not for ever. */
	for (int i = 0; now_ns() < end || (!a->done && now_ns() < end + 15000000000ULL); i++) {
		arena_cross(a, &seed);
		if (i % 4 == 0)
			arena_stir(a, &seed);
	}
	atomic_store(&a->over, true);
	for (int i = 0; i < 2; i++)
		join(threads[i]);
	if (!a->done)
		fail("expected requests to be taken in between, none was; %u crossings were refused",
		     a->refused);
	/* And now in order: the channel has survived. */
	for (int i = 0; i < 16; i++)
		a->r.sq[i] = (struct mp_request){ .op = 99 };
	arena_cross(a, &seed);
	arena_end(a);
	free(a);
}

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

static bool write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool right = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	if (fd >= 0)
		close(fd);
	return right;
}

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
static void live(int device_fd, int listener, const struct pair *p, char *data, size_t size)
{
	struct mp_create args = { SIZES(8, 8), .flags = batch ? MP_BATCH : 0 };
	struct iovec parts[2] = { { data, size }, { data, size } };
	unsigned char mask = 0xff;
	const struct mp_request requests[] = {
		{ .op = MP_OP_REGISTER, .handle = 1, .fd = p->mine },
		{ .op = MP_OP_REGISTER, .handle = 100000, .fd = listener,
		  .addr = (uintptr_t)&mask, .len = 1 },
		{ .op = MP_OP_READ, .handle = 1, .addr = (uintptr_t)data, .len = 1 },
		{ .op = MP_OP_ACCEPT, .handle = 100000, .len = 2 },
		{ .op = MP_OP_WRITEV, .handle = 1, .addr = (uintptr_t)parts, .len = 2 },
		{ .op = MP_OP_UNREGISTER, .handle = 1 },
	};
	struct raw r = { .fd = minus_errno(ioctl(device_fd, MP_IOC_CREATE, &args)) };
	void *memory;

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
	for (size_t i = 0; i < sizeof(requests) / sizeof(*requests); i++) {
		raw_put(&r, requests[i]);
		EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 1);
		EXPECT(raw_wait(&r, 0, 0), 0);
		while (raw_waiting(&r)) {
			struct mp_completion c = raw_take(&r);

			/* Its registration has found no memory. */
			if (c.result == -ENOENT)
				continue;
			if (!no_memory(c.result) && c.op == MP_OP_ACCEPT)
				close(c.result);
		}
	}
	raw_close(&r);
}

/* Each allocation on the way fails once. Only a kernel with fault injection can do it. */
static void test_no_memory(void)
{
	enum { SIZE = 100000, MOST = 3000 };
	int fd = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC), failed;
	int listener = listening(), device_fd = device();
	char *data = make_pattern(SIZE);

	if (fd < 0)
		return;
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
		live(device_fd, listener, &p, data, SIZE);
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
	TRUE(failed > 5 && failed < MOST);
	free(data);
}

/* --- several channels, one listener ------------------------------------------------------- */

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

/* --- what is left behind ------------------------------------------------------------------- */

static struct {
	int sockets;
	int references;		/* to the module */
} at_start;

static int number_after(const char *path, const char *before)
{
	FILE *file = fopen(path, "re");
	char line[256];
	int number = -1;

	while (file && fgets(line, sizeof(line), file)) {
		const char *at = strstr(line, before);

		if (!at)
			continue;
		number = atoi(at + strlen(before));
		break;
	}
	if (file)
		fclose(file);
	return number;
}

static int tcp_sockets(void)
{
	return number_after("/proc/net/sockstat", "TCP: inuse ");
}

static int module_references(void)
{
	FILE *file = fopen("/proc/modules", "re");
	char line[256];
	int number = -1;

	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "megapipe %*d %d", &number) == 1)
			break;
	if (file)
		fclose(file);
	return number;
}

static void test_nothing_left(void)
{
	for (int i = 0; i < 300; i++) {
		if (tcp_sockets() <= at_start.sockets &&
		    module_references() <= at_start.references)
			return;
		sleep_ms(10);
	}
	fail("expected %d sockets and %d references to the module, as before, found %d and %d",
	     at_start.sockets, at_start.references, tcp_sockets(), module_references());
}

static void test_kmemleak(void)
{
	int fd = open("/sys/kernel/debug/kmemleak", O_RDWR | O_CLOEXEC);
	char text[4096], *found;
	ssize_t length;

	if (fd < 0)
		return;		/* not this kernel */
	sleep_ms(6000);		/* younger objects do not count */
	for (int i = 0; i < 2; i++)
		MUST(write(fd, "scan", 4));
	length = read(fd, text, sizeof(text) - 1);
	if (length <= 0)
		return;
	text[length] = '\0';
	found = strstr(text, "megapipe");
	if (found)
		fail("kmemleak: %.300s", text);
}

/* --- running the cases ----------------------------------------------------------------------- */

static const struct {
	const char *name;
	void (*run)(void);
} cases[] = {
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
	{ "tiny-rings", test_tiny_rings },
	{ "held-back", test_held_back },
	{ "full-rings", test_full_rings },
	{ "wrong-handle", test_wrong_handle },
	{ "wrong-descriptor", test_wrong_descriptor },
	{ "closed-after", test_closed_after },
	{ "twice", test_twice },
	{ "busy", test_busy },
	{ "wrong-use", test_wrong_use },
	{ "bad-buffer", test_bad_buffer },
	{ "bad-iovec", test_bad_iovec },
	{ "unmapped-while-pending", test_unmapped_while_pending },
	{ "foreign-thread", test_foreign_thread },
	{ "owner-gone", test_owner_gone },
	{ "close-under-owner", test_close_under_owner },
	{ "fork", test_fork },
	{ "fork-closes", test_fork_closes },
	{ "unshare", test_unshare },
	{ "descriptor-passed", test_descriptor_passed },
	{ "exec", test_exec },
	{ "ioctls", test_ioctls },
	{ "create-raw", test_create_raw },
	{ "mmap", test_mmap },
	{ "indices", test_indices },
	{ "requests", test_requests },
	{ "wait-raw", test_wait_raw },
	{ "random-requests", test_random_requests },
	{ "scribble", test_scribble },
	{ "close-pending", test_close_pending },
	{ "close-flood", test_close_flood },
	{ "kill", test_kill },
	{ "many-channels", test_many_channels },
	{ "many-registrations", test_many_registrations },
	{ "no-memory", test_no_memory },
	{ "emfile", test_emfile },
	{ "handle-limit", test_handle_limit },
	{ "hand-on", test_hand_on },
	{ "shared-listener", test_shared_listener },
	/* These look at what all of the above have left. */
	{ "nothing-left", test_nothing_left },
	{ "kmemleak", test_kmemleak },
};

enum { CASES = sizeof(cases) / sizeof(*cases) };

static int time_limit = 30;	/* seconds, for one case */
static int kernel_log = -1;

/* The first complaint of the kernel since the last call, or NULL. */
static const char *kernel_complaint(void)
{
	static const char *const signs[] = {
		"WARNING:", "BUG:", "Oops", "KASAN", "UBSAN", "general protection", "INFO: ",
		"soft lockup", "refcount_t", "use-after-free", "list_add corruption",
		"list_del corruption", "scheduling while atomic",
	};
	static char found[300];
	char record[2048];
	bool any = false;

	for (;;) {
		ssize_t length = read(kernel_log, record, sizeof(record) - 1);
		char *text;

		if (length < 0 && errno == EPIPE)
			continue;	/* records have been overwritten: go on behind */
		if (length <= 0)
			break;
		record[length] = '\0';
		text = strchr(record, ';');
		for (size_t i = 0; text && !any && i < sizeof(signs) / sizeof(*signs); i++) {
			if (!strstr(text, signs[i]))
				continue;
			any = true;
			snprintf(found, sizeof(found), "%.*s", (int)strcspn(text + 1, "\n"),
				 text + 1);
		}
	}
	return any ? found : NULL;
}

static void __attribute__((noreturn)) run_child(int index, int pipe_end)
{
	setpgid(0, 0);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGPIPE, SIG_DFL);	/* a write must not raise it */
	report_fd = pipe_end;
	cases[index].run();
	_exit(0);
}

/* Wait for a child no longer than the time limit. Returns false if it has passed. */
static bool reap(pid_t pid, int seconds, int *status)
{
	struct timespec left = { .tv_nsec = 100000000 };
	uint64_t end = now_ns() + seconds * 1000000000ULL;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	for (;;) {
		if (waitpid(pid, status, WNOHANG) == pid)
			return true;
		if (now_ns() >= end)
			return false;
		sigtimedwait(&set, NULL, &left);
	}
}

static bool run_case(int index)
{
	char name[64], text[600];
	const char *complaint;
	ssize_t length;
	int ends[2], status = 0;
	bool ended;
	pid_t pid;

	snprintf(name, sizeof(name), "%s/%s", cases[index].name, batch ? "batch" : "plain");
	pid = pipe2(ends, O_CLOEXEC | O_NONBLOCK) ? -1 : fork();
	if (pid < 0) {
		printf("FAIL %s: cannot start: %s\n", name, strerror(errno));
		return false;
	}
	if (!pid)
		run_child(index, ends[1]);
	setpgid(pid, pid);
	ended = reap(pid, time_limit, &status);
	kill(-pid, SIGKILL);
	close(ends[1]);
	length = read(ends[0], text, sizeof(text) - 1);
	close(ends[0]);
	text[length > 0 ? length : 0] = '\0';
	complaint = kernel_complaint();

	if (!ended && !reap(pid, 10, &status))
		printf("FAIL %s: not over after %d s, and SIGKILL does not end it\n", name,
		       time_limit);
	else if (!ended)
		printf("FAIL %s: not over after %d s%s%s\n", name, time_limit,
		       *text ? "; " : "", text);
	else if (*text)
		printf("FAIL %s: %s\n", name, text);
	else if (status)
		printf("FAIL %s: expected to end well, its wait status is %#x\n", name, status);
	else if (complaint)
		printf("FAIL %s: the kernel says: %s\n", name, complaint);
	else
		printf("ok %s\n", name);
	return ended && !*text && !status && !complaint;
}

static bool chosen(int index, char **names, int count)
{
	for (int i = 0; i < count; i++)
		if (!strcmp(names[i], cases[index].name))
			return true;
	return count == 0;
}

static void usage(void)
{
	puts("usage: mp-test [--plain | --batch] [--scale N] [--limit SECONDS] [case...]\n"
	     "       mp-test --list\n"
	     "Runs every case, or those named, in both modes, or in the one named. Long loops go\n"
	     "round N times as often; a case that takes longer than the limit (30 s) has failed.\n"
	     "Exit status: 0, all are right; 1, some are not; 2, wrong arguments or no module.");
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "plain", no_argument, NULL, 'p' },
		{ "batch", no_argument, NULL, 'b' },
		{ "scale", required_argument, NULL, 's' },
		{ "limit", required_argument, NULL, 'l' },
		{ "list", no_argument, NULL, 'L' },
		{ "help", no_argument, NULL, 'h' },
		{ NULL, 0, NULL, 0 },
	};
	bool plain = true, batched = true, right = true;
	sigset_t set;
	int option;

	if (argc == 5 && !strcmp(argv[1], "--exec-child"))
		return exec_child(argv + 2);
	while ((option = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		switch (option) {
		case 'p':
			batched = false;
			break;
		case 'b':
			plain = false;
			break;
		case 's':
			scale = atoi(optarg);
			break;
		case 'l':
			time_limit = atoi(optarg);
			break;
		case 'L':
			for (int i = 0; i < CASES; i++)
				puts(cases[i].name);
			return 0;
		case 'h':
			usage();
			return 0;
		default:
			usage();
			return 2;
		}
	}
	for (int i = optind; i < argc; i++) {
		int known = 0;

		for (int j = 0; j < CASES; j++)
			known += !strcmp(argv[i], cases[j].name);
		if (!known) {
			fprintf(stderr, "mp-test: there is no case \"%s\": see --list\n", argv[i]);
			return 2;
		}
	}
	if (scale < 1 || time_limit < 1) {
		fputs("mp-test: --scale and --limit need a number from 1\n", stderr);
		return 2;
	}
	if (access("/dev/megapipe", R_OK | W_OK)) {
		fprintf(stderr, "mp-test: /dev/megapipe: %s: is the module loaded?\n",
			strerror(errno));
		return 2;
	}

	setvbuf(stdout, NULL, _IOLBF, 0);
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_BLOCK, &set, NULL);
	at_start.sockets = tcp_sockets();
	at_start.references = module_references();
	/* Without the right to read it, the kernel's complaints go unnoticed. */
	kernel_log = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (kernel_log >= 0)
		lseek(kernel_log, 0, SEEK_END);

	for (int mode = 0; mode < 2; mode++) {
		batch = mode;
		if (!(batch ? batched : plain))
			continue;
		for (int i = 0; i < CASES; i++)
			if (chosen(i, argv + optind, argc - optind))
				right &= run_case(i);
	}
	return !right;
}
