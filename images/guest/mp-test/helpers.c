// SPDX-License-Identifier: GPL-2.0
/* Sockets, channels, threads and children for the cases, and how they fail. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>

#include "test.h"

bool batch;
int scale = 1;
int report_fd = -1;

/* --- failing -------------------------------------------------------------------- */

void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...)
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

const char *show(long long value)
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

int minus_errno(long ret)
{
	return ret < 0 ? -errno : ret;
}

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

void sleep_ms(int ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000L };

	while (nanosleep(&t, &t) < 0)
		;
}

/* xorshift: the same numbers in each run. */
uint64_t random_next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

bool write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool right = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	if (fd >= 0)
		close(fd);
	return right;
}

/* --- sockets --------------------------------------------------------------------- */

int port_of(int fd)
{
	struct sockaddr_in address;
	socklen_t size = sizeof(address);

	MUST(getsockname(fd, (struct sockaddr *)&address, &size));
	return ntohs(address.sin_port);
}

int tcp_socket(void)
{
	return MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
}

int bound(int fd)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};

	MUST(bind(fd, (struct sockaddr *)&address, sizeof(address)));
	return fd;
}

int listening(void)
{
	int fd = bound(tcp_socket());

	MUST(listen(fd, 1024));
	return fd;
}

int connected_from(int fd, int listener)
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

int connected(int listener)
{
	return connected_from(tcp_socket(), listener);
}

/* Close with a FIN instead. */
void close_politely(int fd)
{
	struct linger no = { 0, 0 };

	MUST(setsockopt(fd, SOL_SOCKET, SO_LINGER, &no, sizeof(no)));
	MUST(close(fd));
}

unsigned int backlog(int listener)
{
	struct tcp_info info;
	socklen_t size = sizeof(info);

	MUST(getsockopt(listener, IPPROTO_TCP, TCP_INFO, &info, &size));
	return info.tcpi_unacked;	/* of a listener: connections that wait */
}

void wait_backlog(int listener, unsigned int count)
{
	for (int i = 0; backlog(listener) != count; i++) {
		if (i == SOON)
			fail("expected %u connections to wait, %u do", count, backlog(listener));
		sleep_ms(1);
	}
}

/* @buffers: bytes of the buffers between them, 0: the kernel's default. */
struct pair make_pair(int listener, int buffers)
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

struct pair tcp_pair(int buffers)
{
	int listener = listening();
	struct pair p = make_pair(listener, buffers);

	close(listener);
	return p;
}

void end_pair(struct pair *p)
{
	close(p->mine);
	close(p->peer);
}

void peer_sends(const struct pair *p, const char *text)
{
	EXPECT(send(p->peer, text, strlen(text), MSG_NOSIGNAL), strlen(text));
}

void peer_gets(const struct pair *p, const char *text)
{
	char buffer[64];
	size_t size = strlen(text);

	EXPECT(minus_errno(recv(p->peer, buffer, size, MSG_WAITALL)), size);
	TRUE(!memcmp(buffer, text, size));
}

/* The other side has ended: end of file, or a reset. */
void peer_sees_end(int fd)
{
	char byte;
	int ret = minus_errno(recv(fd, &byte, 1, 0));

	if (ret != 0 && ret != -ECONNRESET)
		fail("expected the connection to have ended, recv() gave %s", show(ret));
}

void peer_sees_life(int fd)
{
	char byte;

	EXPECT(minus_errno(recv(fd, &byte, 1, MSG_DONTWAIT)), -EAGAIN);
}

char pattern(size_t at)
{
	return at * 31 + (at >> 8);
}

char *make_pattern(size_t size)
{
	char *data = malloc(size);

	TRUE(data);
	for (size_t i = 0; i < size; i++)
		data[i] = pattern(i);
	return data;
}

void *read_slowly(void *argument)
{
	struct slow_reader *r = argument;
	char buffer[8192];
	size_t at = 0;

	while (at < r->size) {
		ssize_t n = read(r->fd, buffer, sizeof(buffer));

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

char *half_page(int protection)
{
	char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	TRUE(page != MAP_FAILED);
	MUST(mprotect(page + 4096, 4096, protection));
	return page;
}

/* --- channels through the library ------------------------------------------------- */

struct mp_channel *make_channel(const struct mp_options *options)
{
	struct mp_channel *ch = mp_create(options);

	if (!ch)
		fail("mp_create: %s", strerror(errno));
	return ch;
}

struct mp_channel *channel_of(unsigned int requests, unsigned int completions)
{
	struct mp_options options = {
		.flags = batch ? MP_BATCH : 0,
		.requests = requests,
		.completions = completions,
	};

	return make_channel(&options);
}

struct mp_channel *channel_with(unsigned int flags)
{
	struct mp_options options = { .flags = flags | (batch ? MP_BATCH : 0) };

	return make_channel(&options);
}

struct mp_channel *channel(void)
{
	return channel_of(0, 0);
}

struct mp_event next(struct mp_channel *ch)
{
	struct mp_event event;
	int ret = mp_dispatch(ch, &event, SOON);

	if (ret == 0)
		fail("expected an event, none came");
	if (ret < 0)
		fail("expected an event, mp_dispatch() gave %s", show(ret));
	return event;
}

bool may_come(struct mp_channel *ch, struct mp_event *event, int timeout_ms)
{
	int ret = mp_dispatch(ch, event, timeout_ms);

	if (ret < 0)
		fail("expected an event or none, mp_dispatch() gave %s", show(ret));
	return ret;
}

const char *op_name(unsigned int op)
{
	static const char *const names[] = {
		"register", "unregister", "accept", "read", "write", "writev", "disconnect",
		"convert", "drop",
	};

	return op < MP_NR_OPS ? names[op] : "?";
}

struct mp_event want_at(struct place at, struct mp_channel *ch, int handle, unsigned int op,
			       int result)
{
	struct mp_event e = next(ch);

	if (e.handle != handle || e.op != op || e.result != result)
		fail("%s:%d: expected %s on handle %d with %s, came %s on %d with %s", at.file, at.line,
		     op_name(op), handle, show(result), op_name(e.op), e.handle, show(e.result));
	return e;
}

void nothing_at(struct place at, struct mp_channel *ch)
{
	struct mp_event e;
	int ret = mp_dispatch(ch, &e, NEVER);

	if (ret < 0)
		fail("%s:%d: expected no event, mp_dispatch() gave %s", at.file, at.line, show(ret));
	if (ret)
		fail("%s:%d: expected no event, came %s on handle %d with %s", at.file, at.line,
		     op_name(e.op), e.handle, show(e.result));
}

/* The same, and the kernel does not pass the time with looking again and again. */
void sleeps_at(struct place at, struct mp_channel *ch)
{
	enum { WHILE = 300, TRIES = 4 };
	struct rusage before, after;
	struct mp_event e;
	int used = WHILE;

	/* A stalled host looks like a busy thread; one that does not sleep is busy each time. */
	for (int i = 0; i < TRIES && used > WHILE / 2; i++) {
		MUST(getrusage(RUSAGE_THREAD, &before));
		EXPECT(mp_dispatch(ch, &e, WHILE), 0);
		MUST(getrusage(RUSAGE_THREAD, &after));
		used = (after.ru_stime.tv_sec - before.ru_stime.tv_sec) * 1000 +
		       (after.ru_stime.tv_usec - before.ru_stime.tv_usec) / 1000;
	}
	if (used > WHILE / 2)
		fail("%s:%d: expected the thread to sleep %d ms, it was busy for %d of them", at.file, at.line, WHILE, used);
}

int add(struct mp_channel *ch, int fd)
{
	int handle = mp_register(ch, fd, NULL, NULL, 0);

	if (handle < 0)
		fail("mp_register() gave %s", show(handle));
	return handle;
}

struct pair added_pair(struct mp_channel *ch, int buffers)
{
	struct pair p = tcp_pair(buffers);

	p.handle = add(ch, p.mine);
	return p;
}

/* The channel works, whatever has been done to it. */
void still_works(struct mp_channel *ch)
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

int device(void)
{
	return MUST(open("/dev/megapipe", O_RDWR | O_CLOEXEC));
}

int raw_create(struct mp_create *args)
{
	int fd = device();
	int ret = minus_errno(ioctl(fd, MP_IOC_CREATE, args));

	close(fd);
	return ret;
}

struct raw raw_channel(uint32_t sq_entries, uint32_t cq_entries)
{
	return raw_channel_with(sq_entries, cq_entries, 0);
}

struct raw raw_channel_with(uint32_t sq_entries, uint32_t cq_entries, unsigned int flags)
{
	struct raw r = { .args = { SIZES(sq_entries, cq_entries),
				   .flags = flags | (batch ? MP_BATCH : 0) } };
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

void raw_close(struct raw *r)
{
	MUST(munmap(r->shared, r->args.bytes));
	MUST(close(r->fd));
}

int enter(int fd, unsigned long flags)
{
	return minus_errno(ioctl(fd, MP_IOC_ENTER, flags));
}

int raw_wait(struct raw *r, unsigned long flags, int64_t timeout_ns)
{
	r->shared->timeout_ns = timeout_ns;
	return enter(r->fd, flags | MP_ENTER_WAIT);
}

void raw_put(struct raw *r, struct mp_request request)
{
	r->sq[r->sq_tail & (r->args.sq_entries - 1)] = request;
	__atomic_store_n(&r->shared->sq_tail, ++r->sq_tail, __ATOMIC_RELEASE);
}

unsigned int raw_waiting(const struct raw *r)
{
	return __atomic_load_n(&r->shared->cq_tail, __ATOMIC_ACQUIRE) - r->cq_head;
}

struct mp_completion raw_take(struct raw *r)
{
	struct mp_completion c = r->cq[r->cq_head & (r->args.cq_entries - 1)];

	__atomic_store_n(&r->shared->cq_head, ++r->cq_head, __ATOMIC_RELEASE);
	if (c.reserved || c.reserved2)
		fail("expected the reserved fields of a completion to be 0");
	return c;
}

/* Send one request down that completes at once. */
struct mp_completion raw_do(struct raw *r, struct mp_request request)
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
void raw_begin(struct raw *r, struct mp_request request)
{
	raw_put(r, request);
	EXPECT(enter(r->fd, MP_ENTER_SUBMIT), 1);
	EXPECT(raw_waiting(r), 0);
}

void raw_register(struct raw *r, uint32_t handle, int fd)
{
	raw_begin(r, (struct mp_request){ .op = MP_OP_REGISTER, .handle = handle, .fd = fd });
}

struct mp_completion raw_next(struct raw *r)
{
	if (!raw_waiting(r))
		EXPECT(raw_wait(r, 0, SOON * 1000000LL), 0);
	if (!raw_waiting(r))
		fail("expected a completion, none came");
	return raw_take(r);
}

/* --- threads and children ------------------------------------------------------------ */

pthread_t start(void *(*run)(void *), void *argument)
{
	pthread_t thread;
	int ret = pthread_create(&thread, NULL, run, argument);

	if (ret)
		fail("pthread_create: %s", strerror(ret));
	return thread;
}

void join(pthread_t thread)
{
	EXPECT(pthread_join(thread, NULL), 0);
}

/* Returns 0 in the child. */
pid_t child(void)
{
	pid_t pid = MUST(fork());

	if (!pid)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return pid;
}

int status_of(pid_t pid)
{
	int status;

	while (waitpid(pid, &status, 0) < 0)
		TRUE(errno == EINTR);
	return status;
}

/* The child must have found everything right; it reports by itself if not. */
void child_ends_well(pid_t pid)
{
	int status = status_of(pid);

	if (WIFEXITED(status) && WEXITSTATUS(status) == 1)
		_exit(1);
	if (status)
		fail("expected a child to end well, its wait status is %#x", status);
}

int open_descriptors(void)
{
	int count = 0;

	for (int fd = 0; fd < 2048; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

void interrupt(int number)
{
	(void)number;
}

/* Signal this process after @ms, and, if @again, each @ms. */
void set_timer(int ms, bool again)
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
