// SPDX-License-Identifier: GPL-2.0
/*
 * Partitioned listeners. Over the loopback device a handshake is processed on
 * the CPU of the thread that connects.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/un.h>

#include "test.h"

static int cpus(void)
{
	return sysconf(_SC_NPROCESSORS_ONLN);
}

/* This thread goes on on this CPU. */
static void move_to(int cpu)
{
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	MUST(sched_setaffinity(0, sizeof(one), &one));
}

static int connected_on(int cpu, int listener)
{
	cpu_set_t before;
	int fd;

	MUST(sched_getaffinity(0, sizeof(before), &before));
	move_to(cpu);
	fd = connected(listener);
	MUST(sched_setaffinity(0, sizeof(before), &before));
	return fd;
}

/* Register @listener for the CPUs of the bits of @mask. */
static int part(struct mp_channel *ch, int listener, unsigned long mask)
{
	int handle = mp_register(ch, listener, NULL, &mask, sizeof(mask));

	TRUE(handle >= 0);
	EXPECT(mp_flush(ch), 0);	/* @mask is read now */
	return handle;
}

static void takes(struct mp_channel *ch, int handle, int peer)
{
	struct mp_event e;
	char byte = 0;

	EXPECT(mp_accept(ch, handle, 1, false), 0);
	e = next(ch);
	EXPECT(e.op, MP_OP_ACCEPT);
	EXPECT(e.handle, handle);
	TRUE(e.result >= 0);
	/* It is this one, and no other. */
	EXPECT(write(e.result, "x", 1), 1);
	EXPECT(read(peer, &byte, 1), 1);
	EXPECT(byte, 'x');
	close(e.result);
	close(peer);
}

static void original_takes(int listener, int peer)
{
	char byte = 0;
	int fd;

	wait_backlog(listener, 1);
	fd = MUST(accept(listener, NULL, NULL));
	EXPECT(write(fd, "x", 1), 1);
	EXPECT(read(peer, &byte, 1), 1);
	close(fd);
	close(peer);
}

static void test_part_queues(void)
{
	struct mp_channel *a = channel_with(MP_PARTITION), *b = channel_with(MP_PARTITION);
	int listener = listening(), first, second, peers[3];
	struct mp_event e;

	if (cpus() < 3)
		fail("needs three CPUs");
	first = part(a, listener, 1 << 0);
	second = part(b, listener, 1 << 1);
	for (int round = 0; round < 3; round++) {
		peers[0] = connected_on(0, listener);
		peers[1] = connected_on(1, listener);
		peers[2] = connected_on(2, listener);
		original_takes(listener, peers[2]);
		takes(b, second, peers[1]);
		takes(a, first, peers[0]);
	}
	/* An accept that waits is woken by a connection of its own CPU only. */
	EXPECT(mp_accept(a, first, 1, false), 0);
	NOTHING(a);
	peers[1] = connected_on(1, listener);
	NOTHING(a);
	peers[0] = connected_on(0, listener);
	e = next(a);
	TRUE(e.op == MP_OP_ACCEPT && e.result >= 0 && e.queued == 0);
	close(e.result);
	close(peers[0]);
	takes(b, second, peers[1]);
	/* The number that is left is that of its own queue. */
	for (int i = 0; i < 3; i++)
		peers[i] = connected_on(i < 2 ? 0 : 1, listener);
	EXPECT(mp_accept(a, first, 1, false), 0);
	e = next(a);
	TRUE(e.result >= 0 && e.queued == 1);
	close(e.result);
	for (int i = 0; i < 3; i++)
		close(peers[i]);
	mp_close(a);
	mp_close(b);
	close(listener);
}

/* No CPU is in two parts, whichever channel, thread or descriptor asks. */
static void test_part_disjoint(void)
{
	struct mp_channel *a = channel_with(MP_PARTITION), *b = channel_with(MP_PARTITION);
	int listener = listening(), other = listening(), twin = MUST(dup(listener)), handle;
	unsigned char wide[1024] = { 0 };
	const unsigned long overlapping[] = { 1 << 1, 1 << 0 | 1 << 1, ~0UL };

	handle = part(a, listener, 1 << 1 | 1 << 2);
	for (size_t i = 0; i < sizeof(overlapping) / sizeof(*overlapping); i++) {
		int bad = part(b, i & 1 ? twin : listener, overlapping[i]);

		WANT(b, bad, MP_OP_REGISTER, -EBUSY);
		EXPECT(mp_unregister(b, bad), 0);
		NOTHING(b);
	}
	/* Another socket has CPUs of its own. */
	part(b, other, 1 << 1);
	NOTHING(b);
	part(b, listener, 1 << 0);
	NOTHING(b);
	EXPECT(mp_unregister(a, handle), 0);
	NOTHING(a);
	/* They are free again. A mask longer than the machine has CPUs is fine. */
	wide[0] = 1 << 1;
	wide[1023] = 0x80;
	handle = mp_register(b, listener, NULL, wide, sizeof(wide));
	EXPECT(mp_flush(b), 0);
	NOTHING(b);
	takes(b, handle, connected_on(1, listener));
	mp_close(a);
	mp_close(b);
	close(twin);
	close(other);
	close(listener);
}

static void test_part_closes(void)
{
	struct mp_channel *ch = channel_with(MP_PARTITION);
	int listener = listening(), handle = part(ch, listener, 1 << 1), peers[2];

	peers[0] = connected_on(1, listener);
	peers[1] = connected_on(1, listener);
	EXPECT(mp_unregister(ch, handle), 0);
	EXPECT(mp_flush(ch), 0);
	NOTHING(ch);
	/* What was in its queue is reset; what comes now is the original's. */
	peer_sees_end(peers[0]);
	peer_sees_end(peers[1]);
	close(peers[0]);
	close(peers[1]);
	original_takes(listener, connected_on(1, listener));
	/* And so when the channel goes, or its process. */
	part(ch, listener, 1 << 1);
	mp_close(ch);
	original_takes(listener, connected_on(1, listener));
	for (int i = 0; i < 5; i++) {
		int ready[2];
		char byte;
		pid_t pid;

		MUST(pipe(ready));
		pid = child();
		if (!pid) {
			ch = channel_with(MP_PARTITION);
			handle = part(ch, listener, 1 << 1);
			EXPECT(mp_accept(ch, handle, 10, false), 0);
			EXPECT(mp_flush(ch), 0);
			EXPECT(write(ready[1], "r", 1), 1);
			pause();
		}
		EXPECT(read(ready[0], &byte, 1), 1);
		MUST(kill(pid, SIGKILL));
		status_of(pid);
		original_takes(listener, connected_on(1, listener));
		close(ready[0]);
		close(ready[1]);
	}
	close(listener);
}

/* The user closes or shuts down the original: the part goes on. */
static void test_part_outlives(void)
{
	struct mp_channel *ch = channel_with(MP_PARTITION);
	int listener = listening(), twin = MUST(dup(listener)), handle;

	handle = part(ch, listener, 1 << 1);
	close(listener);
	takes(ch, handle, connected_on(1, twin));
	takes(ch, handle, connected_on(1, twin));
	mp_close(ch);
	close(twin);
}

static int option(int fd, int level, int name)
{
	socklen_t size = sizeof(int);
	int value = 0;

	MUST(getsockopt(fd, level, name, &value, &size));
	return value;
}

/* A connection inherits the same from a part as from the original. */
static void test_part_options(void)
{
	static const struct {
		int level, name, value;
	} options[] = {
		{ SOL_SOCKET, SO_KEEPALIVE, 1 },
		{ SOL_SOCKET, SO_RCVBUF, 20000 },
		{ SOL_SOCKET, SO_SNDBUF, 30000 },
		{ SOL_SOCKET, SO_RCVLOWAT, 3 },
		{ SOL_SOCKET, SO_OOBINLINE, 1 },
		{ SOL_SOCKET, SO_PRIORITY, 5 },
		{ IPPROTO_IP, IP_TOS, 0x20 },
		{ IPPROTO_IP, IP_TTL, 33 },
		{ IPPROTO_TCP, TCP_NODELAY, 1 },
		{ IPPROTO_TCP, TCP_KEEPIDLE, 77 },
		{ IPPROTO_TCP, TCP_KEEPINTVL, 7 },
		{ IPPROTO_TCP, TCP_KEEPCNT, 4 },
		{ IPPROTO_TCP, TCP_USER_TIMEOUT, 9000 },
		{ IPPROTO_TCP, TCP_LINGER2, 9 },
		{ IPPROTO_TCP, TCP_NOTSENT_LOWAT, 12345 },
	};
	struct mp_channel *ch = channel_with(MP_PARTITION);
	int listener = bound(tcp_socket()), handle, peers[2], ordinary;
	struct mp_event e;

	for (size_t i = 0; i < sizeof(options) / sizeof(*options); i++)
		MUST(setsockopt(listener, options[i].level, options[i].name, &options[i].value,
				sizeof(int)));
	MUST(setsockopt(listener, IPPROTO_TCP, TCP_CONGESTION, "reno", 4));
	MUST(listen(listener, 8));
	handle = part(ch, listener, 1 << 1);
	peers[0] = connected_on(0, listener);
	peers[1] = connected_on(1, listener);
	ordinary = MUST(accept(listener, NULL, NULL));
	EXPECT(mp_accept(ch, handle, 1, false), 0);
	e = next(ch);
	TRUE(e.result >= 0);
	for (size_t i = 0; i < sizeof(options) / sizeof(*options); i++)
		if (option(e.result, options[i].level, options[i].name) !=
		    option(ordinary, options[i].level, options[i].name))
			fail("option %d of level %d: expected %d, came %d", options[i].name,
			     options[i].level, option(ordinary, options[i].level, options[i].name),
			     option(e.result, options[i].level, options[i].name));
	char congestion[16] = "";
	socklen_t size = sizeof(congestion);

	MUST(getsockopt(e.result, IPPROTO_TCP, TCP_CONGESTION, congestion, &size));
	TRUE(!strcmp(congestion, "reno"));
	close(e.result);
	close(ordinary);
	close(peers[0]);
	close(peers[1]);
	mp_close(ch);
	close(listener);
}

/* Each queue has the backlog of the socket, and one that is full fills no other. */
static void test_part_backlog(void)
{
	enum { BACKLOG = 2, TRIES = 8 };
	struct mp_channel *ch = channel_with(MP_PARTITION);
	int listener = bound(tcp_socket()), handle, fds[TRIES], taken = 0;
	struct sockaddr_in address;
	socklen_t size = sizeof(address);
	struct mp_event e;

	MUST(listen(listener, BACKLOG));
	MUST(getsockname(listener, (struct sockaddr *)&address, &size));
	handle = part(ch, listener, 1 << 1);
	for (int i = 0; i < TRIES; i++) {
		move_to(1);
		fds[i] = MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
		connect(fds[i], (struct sockaddr *)&address, sizeof(address));
	}
	original_takes(listener, connected_on(0, listener));
	EXPECT(mp_accept(ch, handle, TRIES, false), 0);
	for (; mp_dispatch(ch, &e, 50) == 1; taken++) {
		TRUE(e.result >= 0);
		close(e.result);
	}
	TRUE(taken >= BACKLOG && taken < TRIES);
	for (int i = 0; i < TRIES; i++)
		close(fds[i]);
	mp_close(ch);
	close(listener);
}

/* A socket for both families: the lookups of both find its part. */
static void test_part_ipv6(void)
{
	struct mp_channel *ch = channel_with(MP_PARTITION | MP_LWSOCKET);
	struct sockaddr_in6 address = { .sin6_family = AF_INET6, .sin6_addr = in6addr_any };
	struct sockaddr_in four = { .sin_family = AF_INET,
				    .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int listener = MUST(socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0)), handle, peer;
	socklen_t size = sizeof(address);
	struct pair p = { .mine = -1 };
	char buffer[8];
	struct mp_event e;

	MUST(bind(listener, (struct sockaddr *)&address, size));
	MUST(listen(listener, 8));
	MUST(getsockname(listener, (struct sockaddr *)&address, &size));
	four.sin_port = address.sin6_port;
	handle = part(ch, listener, 1 << 1);
	move_to(1);
	peer = tcp_socket();
	MUST(connect(peer, (struct sockaddr *)&four, sizeof(four)));
	takes(ch, handle, peer);

	/* This guest has no IPv6 unless it is asked for, by root. */
	if (getuid() == 0)
		TRUE(write_text("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "0"));
	else if (access("/proc/sys/net/ipv6/conf/lo/disable_ipv6", W_OK))
		goto out;
	address.sin6_addr = in6addr_loopback;
	for (int cpu = 0; cpu < 2; cpu++) {
		move_to(cpu);
		p.peer = MUST(socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0));
		MUST(connect(p.peer, (struct sockaddr *)&address, sizeof(address)));
		if (!cpu) {
			original_takes(listener, p.peer);
			continue;
		}
		EXPECT(mp_accept(ch, handle, 1, true), 0);
		e = next(ch);
		TRUE(e.op == MP_OP_ACCEPT && mp_is_lwsocket(e.result));
		p.handle = add(ch, e.result);
		EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
		NOTHING(ch);
		peer_sends(&p, "six");
		WANT(ch, p.handle, MP_OP_READ, 3);
		EXPECT(mp_write(ch, p.handle, buffer, 3), 0);
		WANT(ch, p.handle, MP_OP_WRITE, 3);
		peer_gets(&p, "six");
		EXPECT(mp_convert(ch, p.handle), 0);
		TRUE(next(ch).result >= 0);
		close(p.peer);
	}
out:
	mp_close(ch);
	close(listener);
}

static void refused(struct mp_channel *ch, int fd, int want)
{
	int handle = part(ch, fd, 1 << 1);

	WANT(ch, handle, MP_OP_REGISTER, want);
	EXPECT(mp_unregister(ch, handle), 0);
	NOTHING(ch);
	close(fd);
}

static void test_part_refused(void)
{
	struct mp_channel *ch = channel_with(MP_PARTITION);
	struct sockaddr_un path = { .sun_family = AF_UNIX, .sun_path = "\0mp-test-part" };
	struct pair p = tcp_pair(0);
	int fd = tcp_socket(), on = 1;

	refused(ch, p.mine, -EINVAL);
	close(p.peer);
	refused(ch, bound(tcp_socket()), -EINVAL);
	MUST(setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on)));
	bound(fd);
	MUST(listen(fd, 8));
	refused(ch, fd, -EOPNOTSUPP);
	fd = bound(tcp_socket());
	on = 8;
	MUST(setsockopt(fd, IPPROTO_TCP, TCP_FASTOPEN, &on, sizeof(on)));
	MUST(listen(fd, 8));
	refused(ch, fd, -EOPNOTSUPP);
	fd = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	MUST(bind(fd, (struct sockaddr *)&path, sizeof(path)));
	MUST(listen(fd, 8));
	refused(ch, fd, -EINVAL);
	still_works(ch);
	mp_close(ch);
}

/* Parts are made and given up while connections come in on every CPU. */
struct storm {
	int listener;
	atomic_bool over;
};

/* However slow the machine is just now: as many turns are enough for anything. */
enum { MANY_TURNS = 100000 };

static void *connect_all_the_time(void *argument)
{
	struct storm *storm = argument;
	struct sockaddr_in address;
	socklen_t size = sizeof(address);

	MUST(getsockname(storm->listener, (struct sockaddr *)&address, &size));
	for (int i = 0; i < MANY_TURNS && !atomic_load(&storm->over); i++) {
		struct linger reset = { 1, 0 };
		int fd = tcp_socket();

		move_to(i % cpus());
		/* Reset, if the part in whose queue it was has gone meanwhile. */
		if (connect(fd, (struct sockaddr *)&address, size) && errno != ECONNRESET)
			fail("connect: %s", strerror(errno));
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		close(fd);
	}
	return NULL;
}

static void test_part_storm(void)
{
	struct storm storm = { .listener = listening() };
	pthread_t thread = start(connect_all_the_time, &storm);
	int listener = storm.listener, taken = 0;

	MUST(fcntl(listener, F_SETFL, O_NONBLOCK));
	for (int i = 0; i < 100 * scale || (!taken && i < MANY_TURNS); i++) {
		struct mp_channel *ch = channel_with(MP_PARTITION | MP_LWSOCKET);
		int one = part(ch, listener, 1 << (i % cpus()));
		int two = part(ch, listener, 1 << ((i + 1) % cpus()));
		struct mp_event e;
		int fd;

		EXPECT(mp_accept(ch, one, 3, i & 1), 0);
		EXPECT(mp_accept(ch, two, 3, i & 2), 0);
		for (int j = 0; j < 4 && mp_dispatch(ch, &e, 1) == 1; j++) {
			TRUE(e.op == MP_OP_ACCEPT);
			if (e.result >= 0 && !mp_is_lwsocket(e.result))
				close(e.result);
			taken += e.result >= 0;
		}
		if (i & 4)
			EXPECT(mp_unregister(ch, two), 0);
		mp_close(ch);
		while ((fd = accept(listener, NULL, NULL)) >= 0)
			close(fd);
	}
	TRUE(taken > 0);
	atomic_store(&storm.over, true);
	join(thread);
	close(listener);
}

const struct test_case partitions_cases[] = {
	{ "part-queues", test_part_queues },
	{ "part-disjoint", test_part_disjoint },
	{ "part-closes", test_part_closes },
	{ "part-outlives", test_part_outlives },
	{ "part-options", test_part_options },
	{ "part-backlog", test_part_backlog },
	{ "part-ipv6", test_part_ipv6 },
	{ "part-refused", test_part_refused },
	{ "part-storm", test_part_storm },
	{ }
};
