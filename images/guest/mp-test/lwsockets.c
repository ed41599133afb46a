// SPDX-License-Identifier: GPL-2.0
/* Connections without a descriptor. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/param.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "test.h"

static struct mp_channel *light_channel(void)
{
	return channel_with(MP_LWSOCKET);
}

/* A connection whose own side is an lwsocket that has not been registered. */
static struct pair light_number(struct mp_channel *ch, int *number)
{
	struct timeval limit = { SOON / 1000, 0 };
	struct pair p = { .peer = tcp_socket(), .mine = -1, .handle = -1 };
	int listener = listening(), handle = add(ch, listener);
	struct mp_event e;

	MUST(setsockopt(p.peer, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)));
	connected_from(p.peer, listener);
	EXPECT(mp_accept(ch, handle, 1, true), 0);
	e = next(ch);
	EXPECT(e.op, MP_OP_ACCEPT);
	if (e.result < 0 || !mp_is_lwsocket(e.result))
		fail("expected an lwsocket, came %s", show(e.result));
	EXPECT(mp_unregister(ch, handle), 0);
	EXPECT(mp_flush(ch), 0);
	close(listener);
	*number = e.result;
	return p;
}

static struct pair light_pair(struct mp_channel *ch)
{
	struct pair p;
	int number;

	p = light_number(ch, &number);
	p.handle = add(ch, number);
	return p;
}

static void test_light_echo(void)
{
	enum { COUNT = 40 };
	struct mp_channel *ch = light_channel();
	struct pair p[COUNT];
	int before;
	char buffer[8];

	before = open_descriptors();
	for (int i = 0; i < COUNT; i++)
		p[i] = light_pair(ch);
	EXPECT(open_descriptors(), before + COUNT);	/* the peers' */
	for (int i = 0; i < COUNT; i++) {
		struct iovec parts[2] = { { buffer, 2 }, { buffer + 2, 2 } };

		EXPECT(mp_read(ch, p[i].handle, buffer, sizeof(buffer)), 0);
		NOTHING(ch);
		peer_sends(&p[i], "ping");
		WANT(ch, p[i].handle, MP_OP_READ, 4);
		EXPECT(mp_write(ch, p[i].handle, buffer, 4), 0);
		WANT(ch, p[i].handle, MP_OP_WRITE, 4);
		EXPECT(mp_writev(ch, p[i].handle, parts, 2), 0);
		WANT(ch, p[i].handle, MP_OP_WRITEV, 4);
		peer_gets(&p[i], "pingping");
		if (i & 1) {
			EXPECT(mp_disconnect(ch, p[i].handle), 0);
			WANT(ch, p[i].handle, MP_OP_DISCONNECT, 0);
			peer_sees_end(p[i].peer);
		}
		EXPECT(mp_unregister(ch, p[i].handle), 0);
		EXPECT(mp_flush(ch), 0);
		peer_sees_end(p[i].peer);
		close(p[i].peer);
	}
	mp_close(ch);
}

/* In a channel without MP_LWSOCKET, and of a UNIX socket, a descriptor comes. */
static void test_light_plain(void)
{
	struct mp_channel *ch = channel();
	int listener = listening(), peer = connected(listener), handle = add(ch, listener);
	struct mp_event e;

	EXPECT(mp_accept(ch, handle, 1, true), 0);
	e = next(ch);
	TRUE(e.op == MP_OP_ACCEPT && e.result >= 0 && !mp_is_lwsocket(e.result));
	EXPECT(write(e.result, "x", 1), 1);
	close(e.result);
	close(peer);
	close(listener);
	mp_close(ch);
}

static void test_light_write_waits(void)
{
	enum { SIZE = 3000000 };
	struct mp_channel *ch = light_channel();
	struct pair p = light_pair(ch);
	struct slow_reader reader = { p.peer, SIZE };
	char *data = make_pattern(SIZE);
	pthread_t thread;

	EXPECT(mp_write(ch, p.handle, data, SIZE), 0);
	NOTHING(ch);
	SLEEPS(ch);
	thread = start(read_slowly, &reader);
	WANT(ch, p.handle, MP_OP_WRITE, SIZE);
	join(thread);
	mp_close(ch);
	peer_sees_end(p.peer);
	close(p.peer);
	free(data);
}

/* Short messages go another way than others; see MP_SHORT in the module. */
static void echo_pieces(struct mp_channel *ch, const struct pair *p, size_t size, uint32_t room)
{
	char *sent = make_pattern(size), *got = calloc(1, size), *back = calloc(1, size);
	size_t done = 0, answered = 0;
	struct mp_event e;

	TRUE(got && back);
	EXPECT(write(p->peer, sent, size), (long)size);
	while (done < size) {
		EXPECT(mp_read(ch, p->handle, got + done, MIN(room, size - done)), 0);
		e = next(ch);
		EXPECT(e.op, MP_OP_READ);
		TRUE(e.result > 0 && e.result <= (int)room);
		done += e.result;
	}
	TRUE(!memcmp(sent, got, size));
	while (answered < size) {
		uint32_t part = MIN(room, size - answered);

		EXPECT(mp_write(ch, p->handle, got + answered, part), 0);
		WANT(ch, p->handle, MP_OP_WRITE, (int)part);
		answered += part;
	}
	EXPECT(recv(p->peer, back, size, MSG_WAITALL), (long)size);
	TRUE(!memcmp(sent, back, size));
	free(sent);
	free(got);
	free(back);
}

static void test_light_short(void)
{
	static const size_t sizes[] = { 1, 2, 7, 8, 9, 64, 255, 256, 257, 600, 5000 };
	static const uint32_t rooms[] = { 1, 3, 64, 255, 256, 257, 4096, 100000 };
	struct mp_channel *ch = light_channel();
	struct pair p = light_pair(ch);
	char buffer[2000], *text = make_pattern(1000);
	int one = 1, got = 0;
	struct mp_event e;

	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++)
		for (size_t k = 0; k < sizeof(rooms) / sizeof(*rooms); k++)
			echo_pieces(ch, &p, sizes[i], rooms[k]);
	/* Packets short and long in one read. */
	MUST(setsockopt(p.peer, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)));
	for (int size = 100; size <= 500; size += 200) {
		EXPECT(write(p.peer, text + got, size), size);
		got += size;
	}
	for (int at = 0; at < got; at += e.result) {
		EXPECT(mp_read(ch, p.handle, buffer + at, sizeof(buffer) - at), 0);
		e = next(ch);
		EXPECT(e.op, MP_OP_READ);
		TRUE(e.result > 0);
	}
	TRUE(!memcmp(buffer, text, got));
	free(text);
	/* The end comes with the last bytes. */
	peer_sends(&p, "last");
	MUST(shutdown(p.peer, SHUT_WR));
	sleep_ms(20);
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	WANT(ch, p.handle, MP_OP_READ, 4);
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	WANT(ch, p.handle, MP_OP_READ, 0);
	mp_close(ch);
	close(p.peer);
}

/* Buffers that are not there yet, or not at all. */
static void test_light_buffers(void)
{
	struct mp_channel *ch = light_channel();
	struct pair p = light_pair(ch);
	char *page = half_page(PROT_NONE), *constant = half_page(PROT_READ) + 4096;
	char *fresh = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	void *const bad[] = { page + 4096, page + 4094, constant, (void *)UINTPTR_MAX };
	struct mp_event e;
	char buffer[16];

	TRUE(fresh != MAP_FAILED);
	/* Read into two pages that nobody has touched; write one of them. */
	peer_sends(&p, "01234567");
	EXPECT(mp_read(ch, p.handle, fresh + 4092, 8), 0);
	WANT(ch, p.handle, MP_OP_READ, 8);
	TRUE(!memcmp(fresh + 4092, "01234567", 8));
	MUST(madvise(fresh, 8192, MADV_DONTNEED));
	EXPECT(mp_write(ch, p.handle, fresh + 4092, 8), 0);
	WANT(ch, p.handle, MP_OP_WRITE, 8);
	EXPECT(recv(p.peer, buffer, 8, MSG_WAITALL), 8);
	TRUE(!memcmp(buffer, "\0\0\0\0\0\0\0\0", 8));

	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		peer_sends(&p, "data");
		EXPECT(mp_read(ch, p.handle, bad[i], 10), 0);
		WANT(ch, p.handle, MP_OP_READ, -EFAULT);
		/* Nothing of it is lost. */
		EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
		WANT(ch, p.handle, MP_OP_READ, 4);
		TRUE(!memcmp(buffer, "data", 4));
	}
	EXPECT(mp_write(ch, p.handle, page + 4096, 10), 0);
	WANT(ch, p.handle, MP_OP_WRITE, -EFAULT);
	EXPECT(mp_write(ch, p.handle, page + 4090, 10), 0);
	e = next(ch);
	EXPECT(e.op, MP_OP_WRITE);
	TRUE(e.result == -EFAULT || (e.result >= 0 && e.result <= 6 && e.error == -EFAULT));
	still_works(ch);
	mp_close(ch);
	close(p.peer);
}

static void test_light_numbers(void)
{
	struct mp_channel *ch = light_channel(), *other = light_channel();
	int number, handle, bad[] = { MP_LWSOCKET_BASE, MP_LWSOCKET_BASE + 63,
				      MP_LWSOCKET_BASE + 64, INT32_MAX };
	struct pair p;

	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		handle = add(ch, bad[i]);
		WANT(ch, handle, MP_OP_REGISTER, -EBADF);
		EXPECT(mp_unregister(ch, handle), 0);
		EXPECT(mp_drop(ch, bad[i]), 0);
		NOTHING(ch);
	}
	EXPECT(mp_drop(ch, 0), -EBADF);
	p = light_number(ch, &number);
	/* It is this channel's, takes no mask, and can be registered once. */
	handle = add(other, number);
	WANT(other, handle, MP_OP_REGISTER, -EBADF);
	handle = mp_register(ch, number, NULL, &number, 1);
	WANT(ch, handle, MP_OP_REGISTER, -EINVAL);
	EXPECT(mp_unregister(ch, handle), 0);
	p.handle = add(ch, number);
	handle = add(ch, number);
	WANT(ch, handle, MP_OP_REGISTER, -EBADF);
	EXPECT(mp_unregister(ch, handle), 0);
	peer_sends(&p, "x");
	peer_sees_life(p.peer);
	close(p.peer);
	/* Dropped, it is gone at once. */
	p = light_number(ch, &number);
	EXPECT(mp_drop(ch, number), 0);
	EXPECT(mp_flush(ch), 0);
	peer_sees_end(p.peer);
	close(p.peer);
	mp_close(ch);
	mp_close(other);
}

static void test_light_convert(void)
{
	struct mp_channel *ch = light_channel();
	struct pair p = light_pair(ch);
	struct sockaddr_in address;
	socklen_t size = sizeof(address);
	struct epoll_event event = { .events = EPOLLIN };
	char buffer[8], link[64], path[64];
	int fd, on = 1, epoll = MUST(epoll_create1(EPOLL_CLOEXEC)), over[2];
	struct mp_event e;
	struct stat status;

	/* A read that is pending stays so, and gets what comes later. */
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	EXPECT(mp_convert(ch, p.handle), 0);
	e = next(ch);
	TRUE(e.op == MP_OP_CONVERT && e.handle == p.handle && e.result >= 0);
	fd = e.result;
	NOTHING(ch);
	SLEEPS(ch);
	peer_sends(&p, "late");
	WANT(ch, p.handle, MP_OP_READ, 4);
	EXPECT(mp_convert(ch, p.handle), 0);
	WANT(ch, p.handle, MP_OP_CONVERT, -EINVAL);

	/* Every ordinary call. */
	EXPECT(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
	EXPECT(fcntl(fd, F_GETFL) & O_NONBLOCK, O_NONBLOCK);
	MUST(fstat(fd, &status));
	TRUE(S_ISSOCK(status.st_mode));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	size = MUST(readlink(path, link, sizeof(link) - 1));
	link[size] = '\0';
	TRUE(!strncmp(link, "socket:[", 8));
	size = sizeof(address);
	MUST(getsockname(fd, (struct sockaddr *)&address, &size));
	MUST(getpeername(fd, (struct sockaddr *)&address, &size));
	MUST(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)));
	EXPECT(send(fd, "sent", 4, MSG_NOSIGNAL), 4);
	peer_gets(&p, "sent");
	MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
	EXPECT(epoll_wait(epoll, &event, 1, NEVER), 0);
	peer_sends(&p, "data");
	EXPECT(epoll_wait(epoll, &event, 1, SOON), 1);
	EXPECT(recv(fd, buffer, sizeof(buffer), 0), 4);
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, over));
	EXPECT(send_descriptor(over[1], fd), 1);

	/* The handle works on, beside it; and may go without closing it. */
	EXPECT(mp_write(ch, p.handle, "more", 4), 0);
	WANT(ch, p.handle, MP_OP_WRITE, 4);
	peer_gets(&p, "more");
	EXPECT(mp_unregister(ch, p.handle), 0);
	EXPECT(mp_flush(ch), 0);
	mp_close(ch);
	peer_sees_life(p.peer);
	close(fd);
	peer_sees_life(p.peer);		/* the one that was sent is still on its way */
	close(over[0]);
	close(over[1]);
	peer_sees_end(p.peer);
	close(p.peer);
	close(epoll);
}

static void *send_all_the_time(void *argument)
{
	struct slow_reader *w = argument;

	for (size_t at = 0; at < w->size; at++) {
		char byte = pattern(at);

		if (send(w->fd, &byte, 1, MSG_NOSIGNAL) != 1)
			fail("the peer of a connection that is converted saw it end");
	}
	return NULL;
}

/* Conversion while data arrives: no byte is lost, and no wake-up. */
static void test_light_convert_traffic(void)
{
	enum { SIZE = 400, ROUNDS = 20 };

	for (int round = 0; round < ROUNDS * scale; round++) {
		struct mp_channel *ch = light_channel();
		struct pair p = light_pair(ch);
		struct slow_reader writer = { p.peer, SIZE };
		char buffer[64];
		pthread_t thread = start(send_all_the_time, &writer);
		int fd = -1, when = round % 10 * SIZE / 10;

		for (int at = 0; at < SIZE;) {
			struct mp_event e;

			EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
			if (at >= when && fd < 0) {
				EXPECT(mp_convert(ch, p.handle), 0);
				fd = 0;
			}
			do {
				e = next(ch);
				if (e.op == MP_OP_CONVERT) {
					TRUE(e.result >= 0);
					fd = e.result;
				}
			} while (e.op != MP_OP_READ);
			TRUE(e.result > 0);
			for (int i = 0; i < e.result; i++)
				EXPECT(buffer[i], pattern(at + i));
			at += e.result;
		}
		join(thread);
		mp_close(ch);
		if (fd > 0)
			close(fd);
		close(p.peer);
	}
}

static void test_light_ends(void)
{
	struct mp_channel *ch = light_channel();
	enum { MANY = 20 };
	struct pair p = light_pair(ch), q = light_pair(ch), r, many[MANY];
	static char big[100000];
	char buffer[8];
	int number;

	/* A reset while a read is pending. */
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	close(p.peer);
	WANT(ch, p.handle, MP_OP_READ, -ECONNRESET);
	/* The peer's FIN. */
	EXPECT(mp_read(ch, q.handle, buffer, sizeof(buffer)), 0);
	close_politely(q.peer);
	WANT(ch, q.handle, MP_OP_READ, 0);
	/* The FIN and then a reset: the end of the stream, as recv() has it, and no error. */
	q = light_pair(ch);
	MUST(shutdown(q.peer, SHUT_WR));
	close(q.peer);
	for (int i = 0; i < 2; i++) {
		EXPECT(mp_read(ch, q.handle, buffer, sizeof(buffer)), 0);
		WANT(ch, q.handle, MP_OP_READ, 0);
	}
	/* The channel goes with everything: pending, and not even registered. */
	for (int i = 0; i < MANY; i++)
		many[i] = light_pair(ch);
	q = light_pair(ch);
	r = light_number(ch, &number);
	for (int i = 0; i < MANY; i++) {
		EXPECT(mp_read(ch, many[i].handle, buffer, sizeof(buffer)), 0);
		EXPECT(mp_write(ch, many[i].handle, big, sizeof(big)), 0);
		close(many[i].peer);
	}
	mp_close(ch);
	peer_sees_end(q.peer);
	peer_sees_end(r.peer);
	close(q.peer);
	close(r.peer);
}

/* Its process is killed with lwsockets of every state. */
static void test_light_kill(void)
{
	int listener = listening();

	for (int i = 0; i < 5; i++) {
		int peers[8];
		pid_t pid = child();

		if (!pid) {
			struct mp_channel *ch = light_channel();
			int handle = add(ch, listener);
			char buffer[8];

			EXPECT(mp_accept(ch, handle, 1000, true), 0);
			for (int j = 0;; j++) {
				struct mp_event e = next(ch);

				TRUE(e.op == MP_OP_ACCEPT && mp_is_lwsocket(e.result));
				if (j & 1)
					EXPECT(mp_read(ch, add(ch, e.result), buffer, 8), 0);
			}
		}
		for (int j = 0; j < 8; j++)
			peers[j] = connected(listener);
		wait_backlog(listener, 0);
		MUST(kill(pid, SIGKILL));
		status_of(pid);
		for (int j = 0; j < 8; j++) {
			peer_sees_end(peers[j]);
			close(peers[j]);
		}
	}
	close(listener);
}

/* As many as there may be descriptors. */
static void test_light_limit(void)
{
	enum { LIMIT = 64, TRIES = 100 };
	struct rlimit limit = { LIMIT, LIMIT };
	struct mp_channel *ch = light_channel();
	int listener = listening(), handle = add(ch, listener), peers[TRIES], taken = 0;
	struct mp_event e;

	for (int i = 0; i < TRIES; i++)
		peers[i] = connected(listener);
	MUST(setrlimit(RLIMIT_NOFILE, &limit));
	EXPECT(mp_accept(ch, handle, TRIES, true), 0);
	for (;; taken++) {
		e = next(ch);
		if (e.result < 0)
			break;
	}
	EXPECT(e.result, -EMFILE);
	EXPECT(taken, LIMIT - 1);	/* and the listener */
	EXPECT(mp_drop(ch, MP_LWSOCKET_BASE), 0);
	EXPECT(mp_accept(ch, handle, 1, true), 0);
	e = next(ch);
	TRUE(mp_is_lwsocket(e.result));
	mp_close(ch);
	for (int i = 0; i < TRIES; i++)
		close(peers[i]);
	close(listener);
}

/* The line of a connection in /proc/net/tcp, by its two ports. */
static bool proc_shows(int local, int remote, unsigned int *uid, unsigned long *inode)
{
	FILE *file = fopen("/proc/net/tcp", "re");
	char line[512];
	bool found = false;

	TRUE(file);
	while (!found && fgets(line, sizeof(line), file)) {
		unsigned int from, to, state;

		found = sscanf(line, " %*u: %*x:%x %*x:%x %x %*x:%*x %*x:%*x %*x %u %*u %lu",
			       &from, &to, &state, uid, inode) == 5 &&
			from == (unsigned int)local && to == (unsigned int)remote;
	}
	fclose(file);
	return found;
}

/* Ask the kernel for every TCP socket, as ss does; returns the one's uid and inode. */
static bool diag_shows(int local, int remote, struct inet_diag_msg *shown)
{
	struct {
		struct nlmsghdr header;
		struct inet_diag_req_v2 ask;
	} request = {
		.header = {
			.nlmsg_len = sizeof(request), .nlmsg_type = SOCK_DIAG_BY_FAMILY,
			.nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP,
		},
		.ask = {
			.sdiag_family = AF_INET, .sdiag_protocol = IPPROTO_TCP,
			.idiag_ext = 0xff, .idiag_states = ~0U,
		},
	};
	static char buffer[65536];
	int fd = MUST(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG));
	bool found = false, over = false;

	EXPECT(send(fd, &request, sizeof(request), 0), sizeof(request));
	while (!over) {
		int length = MUST(recv(fd, buffer, sizeof(buffer), 0));

		for (struct nlmsghdr *h = (void *)buffer; NLMSG_OK(h, length);
		     h = NLMSG_NEXT(h, length)) {
			struct inet_diag_msg *m = NLMSG_DATA(h);

			TRUE(h->nlmsg_type != NLMSG_ERROR);
			if (h->nlmsg_type == NLMSG_DONE) {
				over = true;
				break;
			}
			if (ntohs(m->id.idiag_sport) == local && ntohs(m->id.idiag_dport) == remote) {
				*shown = *m;
				found = true;
			}
		}
	}
	close(fd);
	return found;
}

static int destroy(const struct inet_diag_msg *shown)
{
	struct {
		struct nlmsghdr header;
		struct inet_diag_req_v2 ask;
	} request = {
		.header = {
			.nlmsg_len = sizeof(request), .nlmsg_type = SOCK_DESTROY,
			.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK,
		},
		.ask = {
			.sdiag_family = AF_INET, .sdiag_protocol = IPPROTO_TCP,
			.idiag_states = ~0U, .id = shown->id,
		},
	};
	struct {
		struct nlmsghdr header;
		struct nlmsgerr error;
	} reply;
	int fd = MUST(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG));

	EXPECT(send(fd, &request, sizeof(request), 0), sizeof(request));
	MUST(recv(fd, &reply, sizeof(reply), 0));
	close(fd);
	return reply.error.error;
}

/* What ss and /proc/net/tcp say of one: it is there, its user's, and has no inode. */
static void test_light_shown(void)
{
	struct mp_channel *ch = light_channel();
	struct pair p = light_pair(ch);
	struct sockaddr_in address;
	socklen_t size = sizeof(address);
	struct inet_diag_msg shown;
	unsigned long inode;
	unsigned int uid;
	char buffer[8];
	int local;

	MUST(getpeername(p.peer, (struct sockaddr *)&address, &size));
	local = ntohs(address.sin_port);
	TRUE(proc_shows(local, port_of(p.peer), &uid, &inode));
	EXPECT(uid, getuid());
	EXPECT(inode, 0);
	TRUE(diag_shows(local, port_of(p.peer), &shown));
	EXPECT(shown.idiag_uid, getuid());
	EXPECT(shown.idiag_inode, 0);
	EXPECT(shown.idiag_state, TCP_ESTABLISHED);
	/* Somebody with the right to do so ends it from outside. */
	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	if (destroy(&shown) == 0)
		WANT(ch, p.handle, MP_OP_READ, -ECONNABORTED);
	else
		TRUE(getuid() != 0);
	mp_close(ch);
	close(p.peer);
}

/* Opened and closed without end, from both sides. */
static void *connect_and_leave(void *argument)
{
	int listener = *(int *)argument;

	for (int i = 0; i < 200 * scale; i++) {
		int fd = connected(listener);

		if (i & 1)
			EXPECT(send(fd, "x", 1, MSG_NOSIGNAL) >= -1, 1);
		if (i & 2)
			close_politely(fd);
		else
			close(fd);
	}
	return NULL;
}

static void test_light_storm(void)
{
	int listener = listening();
	struct mp_channel *ch = light_channel();
	int handle = add(ch, listener), ended = 0, total = 400 * scale;
	pthread_t threads[2] = { start(connect_and_leave, &listener),
				 start(connect_and_leave, &listener) };
	static char buffer[8];

	EXPECT(mp_accept(ch, handle, 1 << 20, true), 0);
	while (ended < total) {
		struct mp_event e = next(ch);

		switch (e.op) {
		case MP_OP_ACCEPT:
			TRUE(mp_is_lwsocket(e.result));
			EXPECT(mp_read(ch, add(ch, e.result), buffer, sizeof(buffer)), 0);
			break;
		case MP_OP_READ:
			if (e.result > 0) {
				EXPECT(mp_write(ch, e.handle, buffer, 1), 0);
				break;
			}
			/* fall through */
		default:
			EXPECT(mp_unregister(ch, e.handle), 0);
			ended++;
		}
	}
	join(threads[0]);
	join(threads[1]);
	mp_close(ch);
	close(listener);
}

/*
 * Lwsockets that nobody will see any more are dropped while both rings are full:
 * the drop is a request that has to make room first.
 */
static void test_light_no_room(void)
{
	enum { COUNT = 8, WRITES = 3 };
	struct mp_options options = {
		.flags = MP_LWSOCKET | (batch ? MP_BATCH : 0),
		.requests = WRITES + 1,
		.completions = COUNT,
	};
	struct mp_channel *ch = make_channel(&options);
	int listener = listening(), peers[COUNT], handle;
	struct pair p;

	p = added_pair(ch, 0);
	handle = add(ch, listener);
	for (int i = 0; i < COUNT; i++)
		peers[i] = connected(listener);
	wait_backlog(listener, COUNT);
	EXPECT(mp_accept(ch, handle, COUNT, true), 0);
	EXPECT(mp_flush(ch), 0);
	/* Neither the writes nor this find room for their completions. */
	for (int i = 0; i < WRITES; i++)
		EXPECT(mp_write(ch, p.handle, "abc" + i, 1), 0);
	EXPECT(mp_unregister(ch, handle), 0);
	for (int i = 0; i < WRITES; i++)
		WANT(ch, p.handle, MP_OP_WRITE, 1);
	NOTHING(ch);
	peer_gets(&p, "abc");
	for (int i = 0; i < COUNT; i++) {
		peer_sees_end(peers[i]);
		close(peers[i]);
	}
	still_works(ch);
	close(listener);
	end_pair(&p);
	mp_close(ch);
}

/* Where the cgroup of this process is. */
static char *own_group(void)
{
	FILE *own = fopen("/proc/self/cgroup", "r");
	char line[256], *path;

	TRUE(own && fscanf(own, "0::%255s", line) == 1);
	fclose(own);
	MUST(asprintf(&path, "/sys/fs/cgroup%s", line));
	return path;
}

/* A new one beside it. */
static char *make_group(const char *own, const char *name)
{
	char *path;

	MUST(asprintf(&path, "%s-%s", own, name));
	MUST(mkdir(path, 0755));
	return path;
}

static void enter_group(const char *path)
{
	char procs[512];

	snprintf(procs, sizeof(procs), "%s/cgroup.procs", path);
	TRUE(write_text(procs, "0"));
}

/* Wait until so many pages of packets are charged to it: the statistics are gathered now and then. */
static void want_charged(struct place at, const char *group, long want)
{
	uint64_t end = now_ns() + SOON * 1000000ULL;
	char path[512], key[64];
	long value, found;
	FILE *file;

	snprintf(path, sizeof(path), "%s/memory.stat", group);
	do {
		file = fopen(path, "r");
		TRUE(file);
		found = -1;
		while (found < 0 && fscanf(file, "%63s %ld", key, &value) == 2)
			if (!strcmp(key, "sock"))
				found = value / sysconf(_SC_PAGESIZE);
		fclose(file);
		if (found == want)
			return;
		sleep_ms(20);
	} while (now_ns() < end);
	fail("%s:%d: %s: expected %ld pages of packets, came %ld", at.file, at.line, group, want,
	     found);
}

/* An lwsocket for each of @peers, which has brought a message. */
static void light_accepted(struct mp_channel *ch, int listener, struct pair *pairs,
			   const int *peers, int count)
{
	char buffer[8];

	for (int i = 0; i < count; i++) {
		struct mp_event e;

		connected_from(peers[i], listener);
		EXPECT(write(peers[i], "ping", 4), 4);
		e = next(ch);
		TRUE(e.op == MP_OP_ACCEPT && mp_is_lwsocket(e.result));
		pairs[i] = (struct pair){ .peer = peers[i], .handle = add(ch, e.result) };
		EXPECT(mp_read(ch, pairs[i].handle, buffer, sizeof(buffer)), 0);
		WANT(ch, pairs[i].handle, MP_OP_READ, 4);
	}
}

static void reset_all(struct mp_channel *ch, const struct pair *pairs, int count)
{
	char buffer[8];

	for (int i = 0; i < count; i++) {
		close(pairs[i].peer);
		EXPECT(mp_read(ch, pairs[i].handle, buffer, sizeof(buffer)), 0);
		WANT(ch, pairs[i].handle, MP_OP_READ, -ECONNRESET);
		EXPECT(mp_unregister(ch, pairs[i].handle), 0);
	}
	EXPECT(mp_flush(ch), 0);
}

/* What connections were charged with goes to the next ones of the same cgroup, and back in the end. */
static void test_light_charges(void)
{
	enum { COUNT = 8, ROUNDS = 5 };
	int peers[ROUNDS][COUNT], listener, handle;
	char *own, *first, *second;
	struct pair pairs[COUNT];
	struct mp_channel *ch;

	if (getuid() != 0)	/* may not make cgroups */
		return;
	own = own_group();
	first = make_group(own, "first");
	second = make_group(own, "second");
	listener = listening();
	/* The peers are not charged to either. */
	for (int i = 0; i < ROUNDS * COUNT; i++)
		peers[i / COUNT][i % COUNT] = tcp_socket();
	enter_group(first);
	ch = light_channel();
	handle = add(ch, listener);
	EXPECT(mp_accept(ch, handle, ROUNDS * COUNT, true), 0);

	light_accepted(ch, listener, pairs, peers[0], COUNT);
	want_charged(HERE, first, COUNT);
	reset_all(ch, pairs, COUNT);
	want_charged(HERE, first, COUNT);	/* kept */
	light_accepted(ch, listener, pairs, peers[1], COUNT);
	want_charged(HERE, first, COUNT);	/* and handed on */
	reset_all(ch, pairs, COUNT);

	/* Who has moved is charged anew. */
	enter_group(second);
	light_accepted(ch, listener, pairs, peers[2], COUNT / 2);
	want_charged(HERE, first, COUNT / 2);
	want_charged(HERE, second, COUNT / 2);
	light_accepted(ch, listener, pairs + COUNT / 2, peers[2] + COUNT / 2, COUNT / 2);
	want_charged(HERE, first, 0);
	want_charged(HERE, second, COUNT);
	reset_all(ch, pairs, COUNT);

	/* One that has not ended takes its charge with it. */
	light_accepted(ch, listener, pairs, peers[3], COUNT);
	for (int i = 0; i < COUNT; i++)
		EXPECT(mp_unregister(ch, pairs[i].handle), 0);
	EXPECT(mp_flush(ch), 0);
	for (int i = 0; i < COUNT; i++) {
		peer_sees_end(pairs[i].peer);
		close(pairs[i].peer);
	}
	want_charged(HERE, second, 0);
	light_accepted(ch, listener, pairs, peers[4], COUNT);
	reset_all(ch, pairs, COUNT);
	want_charged(HERE, second, COUNT);
	mp_close(ch);
	want_charged(HERE, second, 0);
	close(listener);
	enter_group(own);
	MUST(rmdir(first));
	MUST(rmdir(second));
	free(first);
	free(second);
	free(own);
}

const struct test_case lwsockets_cases[] = {
	{ "light-echo", test_light_echo },
	{ "light-plain", test_light_plain },
	{ "light-write-waits", test_light_write_waits },
	{ "light-short", test_light_short },
	{ "light-buffers", test_light_buffers },
	{ "light-numbers", test_light_numbers },
	{ "light-no-room", test_light_no_room },
	{ "light-convert", test_light_convert },
	{ "light-convert-traffic", test_light_convert_traffic },
	{ "light-ends", test_light_ends },
	{ "light-kill", test_light_kill },
	{ "light-limit", test_light_limit },
	{ "light-shown", test_light_shown },
	{ "light-charges", test_light_charges },
	{ "light-storm", test_light_storm },
	{ }
};
