// SPDX-License-Identifier: GPL-2.0
/*
 * mp-test --stress: servers and clients on every CPU, and everything that can
 * happen to a channel happening at the same time. Servers do with their handles
 * what comes to their minds, and are killed and started anew all the time.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "test.h"

enum { LISTENERS = 2, CONNECTIONS = 128, BUFFER = 2048 };

struct counts {
	_Atomic uint64_t connections;	/* that clients have had */
	_Atomic uint64_t echoed;	/* bytes that came back, all right */
	_Atomic uint64_t events;	/* that servers have had */
	_Atomic uint64_t converted;
	_Atomic uint64_t parts;
	_Atomic uint64_t killed;	/* servers */
};

static struct counts *counts;
static int listeners[LISTENERS];

struct connection {
	int handle;		/* -1: free */
	int fd;			/* descriptor, lwsocket or -1 */
	bool leaving;
	char buffer[BUFFER];
};

struct server {
	struct mp_channel *ch;
	uint64_t seed;
	int handles[LISTENERS];
	struct connection connections[CONNECTIONS];
};

static bool one_in(struct server *s, int n)
{
	return random_next(&s->seed) % n == 0;
}

static void move_anywhere(uint64_t *seed)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(random_next(seed) % sysconf(_SC_NPROCESSORS_ONLN), &set);
	sched_setaffinity(0, sizeof(set), &set);
}

static void leave(struct server *s, struct connection *c)
{
	if (c->handle < 0)
		return;
	/* Either order is allowed. */
	if (c->fd >= 0 && !mp_is_lwsocket(c->fd) && one_in(s, 2)) {
		close(c->fd);
		c->fd = -1;
	}
	mp_unregister(s->ch, c->handle);
	if (c->fd >= 0 && !mp_is_lwsocket(c->fd))
		close(c->fd);
	c->handle = c->fd = -1;
}

static void take_connection(struct server *s, int fd)
{
	struct connection *c = s->connections;

	while (c < s->connections + CONNECTIONS && c->handle >= 0)
		c++;
	if (c == s->connections + CONNECTIONS || one_in(s, 20)) {
		if (mp_is_lwsocket(fd))
			mp_drop(s->ch, fd);
		else
			close(fd);
		return;
	}
	c->handle = mp_register(s->ch, fd, c, NULL, 0);
	c->fd = fd;
	if (c->handle < 0 || mp_read(s->ch, c->handle, c->buffer, BUFFER) < 0)
		fail("stress: mp_register() or mp_read() refused");
}

static void listen_again(struct server *s, int i)
{
	unsigned char mask = 1 << random_next(&s->seed) % 8;

	s->handles[i] = mp_register(s->ch, listeners[i], &listeners[i], one_in(s, 2) ? &mask : NULL,
				    one_in(s, 2) ? 1 : 0);
	mp_accept(s->ch, s->handles[i], 1 + random_next(&s->seed) % 8, one_in(s, 2));
	mp_flush(s->ch);
	atomic_fetch_add(&counts->parts, 1);
}

/* A thing that nobody should do with a handle, and that must do no harm. */
static void mischief(struct server *s, struct connection *c)
{
	static char other[BUFFER];
	pid_t pid;
	int fd;

	switch (random_next(&s->seed) % 12) {
	case 0:
	case 8:
		mp_convert(s->ch, c->handle);
		break;
	case 1:
		mp_disconnect(s->ch, c->handle);
		break;
	case 2:
		if (c->fd >= 0 && !mp_is_lwsocket(c->fd)) {
			fd = dup(c->fd);
			shutdown(fd, SHUT_WR);
			close(fd);
		}
		break;
	case 3:
		mp_read(s->ch, c->handle, other, sizeof(other));
		mp_read(s->ch, c->handle, other, sizeof(other));
		break;
	case 4:
		mp_write(s->ch, c->handle, other, sizeof(other));
		mp_write(s->ch, c->handle, NO_ADDRESS, 100);
		break;
	case 5:
		leave(s, c);
		break;
	case 6:
		if (one_in(s, 10)) {
			pid = fork();
			if (!pid)
				_exit(0);
			if (pid > 0)
				waitpid(pid, NULL, 0);
		}
		break;
	case 7:
		move_anywhere(&s->seed);
		break;
	}
}

static void handle_event(struct server *s, const struct mp_event *e)
{
	struct connection *c = e->cookie;

	atomic_fetch_add(&counts->events, 1);
	if (e->cookie >= (void *)listeners && e->cookie < (void *)(listeners + LISTENERS)) {
		int i = (int *)e->cookie - listeners;

		if (e->op == MP_OP_ACCEPT && e->result >= 0)
			take_connection(s, e->result);
		if (e->handle == s->handles[i] && !e->more) {
			/* Not registered: a wrong mask, or a CPU that somebody has. */
			if (e->op == MP_OP_REGISTER || one_in(s, 8)) {
				mp_unregister(s->ch, e->handle);
				listen_again(s, i);
			} else {
				mp_accept(s->ch, e->handle, 1 + random_next(&s->seed) % 8,
					  one_in(s, 2));
			}
		}
		return;
	}
	if (e->op == MP_OP_CONVERT && e->result >= 0) {
		atomic_fetch_add(&counts->converted, 1);
		if (c->handle == e->handle)
			c->fd = e->result;
		else
			close(e->result);
	}
	if (c->handle != e->handle)
		return;
	if (one_in(s, 3))
		mischief(s, c);
	if (c->handle < 0)
		return;
	if (e->op == MP_OP_READ && e->result > 0)
		mp_write(s->ch, c->handle, c->buffer, e->result);
	else if (e->op == MP_OP_WRITE && e->result > 0)
		mp_read(s->ch, c->handle, c->buffer, BUFFER);
	else if (e->op != MP_OP_CONVERT && (e->result <= 0 || e->op == MP_OP_DISCONNECT) &&
		 e->result != -EBUSY && e->result != -EFAULT)
		leave(s, c);
}

static void __attribute__((noreturn)) serve(uint64_t seed)
{
	struct server *s = calloc(1, sizeof(*s));

	for (;;) {
		struct mp_options options = {
			.flags = random_next(&seed) % 8,
			.requests = 1 << (2 + random_next(&seed) % 7),
			.completions = 1 << (3 + random_next(&seed) % 8),
		};
		int events = random_next(&seed) % 2000;

		s->seed = seed;
		s->ch = make_channel(&options);
		for (int i = 0; i < CONNECTIONS; i++)
			s->connections[i].handle = s->connections[i].fd = -1;
		for (int i = 0; i < LISTENERS; i++)
			listen_again(s, i);
		while (events--) {
			struct mp_event e;
			int ret = mp_dispatch(s->ch, &e, 20);

			if (ret < 0 && ret != -EINTR)
				fail("stress: mp_dispatch() gave %s", show(ret));
			if (ret > 0)
				handle_event(s, &e);
		}
		seed = s->seed;
		if (random_next(&seed) % 8 == 0)
			execl("/bin/true", "true", NULL);
		if (random_next(&seed) % 8 == 0)
			_exit(0);
		mp_close(s->ch);
		for (int i = 0; i < CONNECTIONS; i++)
			if (s->connections[i].fd >= 0 && !mp_is_lwsocket(s->connections[i].fd))
				close(s->connections[i].fd);
	}
}

/* Send a pattern, look at what comes back, and leave, politely or not. */
static void talk(uint64_t *seed, const struct sockaddr_in *address)
{
	static char sent[BUFFER], got[BUFFER];
	struct timeval limit = { 0, 300000 };
	struct linger reset = { 1, 0 };
	int fd = tcp_socket(), size = 1 + random_next(seed) % BUFFER, back = 0;

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	if (random_next(seed) % 2)
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	if (!connect(fd, (const struct sockaddr *)address, sizeof(*address))) {
		for (int i = 0; i < size; i++)
			sent[i] = random_next(seed);
		atomic_fetch_add(&counts->connections, 1);
		if (send(fd, sent, size, MSG_NOSIGNAL) == size && random_next(seed) % 4) {
			ssize_t n;

			while (back < size && (n = recv(fd, got, size - back, 0)) > 0) {
				/* Servers that do mischief send zeros, or begin anew. */
				for (int i = 0; i < n && got[i] == sent[back + i]; i++)
					atomic_fetch_add(&counts->echoed, 1);
				back += n;
			}
		}
	}
	close(fd);
}

static void __attribute__((noreturn)) be_client(uint64_t seed)
{
	for (;;) {
		struct sockaddr_in address;
		socklen_t size = sizeof(address);

		move_anywhere(&seed);
		if (getsockname(listeners[random_next(&seed) % LISTENERS],
				(struct sockaddr *)&address, &size))
			fail("stress: getsockname: %s", strerror(errno));
		for (int i = random_next(&seed) % 20; i > 0; i--)
			talk(&seed, &address);
	}
}

static pid_t begin(void (*run)(uint64_t), uint64_t seed)
{
	pid_t pid = fork();

	if (!pid) {
		signal(SIGPIPE, SIG_DFL);
		run(seed);
	}
	return pid;
}

int stress(int seconds, uint64_t seed)
{
	int cpus = sysconf(_SC_NPROCESSORS_ONLN), servers = 2 * cpus, clients = 2 * cpus;
	uint64_t now = now_ns(), end = now + seconds * 1000000000ULL, said = now;
	pid_t pids[servers + clients];
	const char *complaint = NULL;
	char text[600];
	ssize_t length;
	int ends[2];

	counts = mmap(NULL, sizeof(*counts), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
		      -1, 0);
	TRUE(counts != MAP_FAILED);
	MUST(pipe2(ends, O_CLOEXEC | O_NONBLOCK));
	report_fd = ends[1];
	printf("stress: %d seconds, %d servers, %d clients, seed %#llx\n", seconds, servers,
	       clients, (unsigned long long)seed);
	fflush(stdout);
	for (int i = 0; i < LISTENERS; i++) {
		listeners[i] = listening();
		fcntl(listeners[i], F_SETFD, 0);	/* stays open in what servers exec() */
	}
	for (int i = 0; i < servers + clients; i++)
		pids[i] = begin(i < servers ? serve : be_client, random_next(&seed));
	*text = '\0';
	while (now_ns() < end && !complaint && !*text) {
		int i = random_next(&seed) % servers;

		sleep_ms(random_next(&seed) % 400);
		kill(pids[i], SIGKILL);
		waitpid(pids[i], NULL, 0);
		atomic_fetch_add(&counts->killed, 1);
		pids[i] = begin(serve, random_next(&seed));
		length = read(ends[0], text, sizeof(text) - 1);
		text[length > 0 ? length : 0] = '\0';
		complaint = kernel_complaint();
		now = now_ns();
		if (now < end && now - said > 10000000000ULL) {
			said = now;
			printf("stress: %llu s left, %llu connections\n",
			       (unsigned long long)((end - now) / 1000000000),
			       (unsigned long long)counts->connections);
		}
	}
	for (int i = 0; i < servers + clients; i++) {
		kill(pids[i], SIGKILL);
		waitpid(pids[i], NULL, 0);
	}
	if (*text || complaint) {
		printf("FAIL stress: %s%s\n", *text ? text : "the kernel says: ",
		       complaint ?: "");
		return 1;
	}
	printf("%s stress: %llu connections, %llu bytes echoed, %llu events, %llu registrations of "
	       "listeners, %llu conversions, %llu servers killed\n",
	       counts->echoed ? "ok" : "FAIL", (unsigned long long)counts->connections,
	       (unsigned long long)counts->echoed, (unsigned long long)counts->events,
	       (unsigned long long)counts->parts, (unsigned long long)counts->converted,
	       (unsigned long long)counts->killed);
	return !counts->echoed;
}
