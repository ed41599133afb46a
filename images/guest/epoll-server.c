/*
 * One pinned thread per CPU, each with its own epoll set that holds a listener
 * and the connections which this thread has accepted; level-triggered.
 *
 * By default the baseline of the paper: one listener that all threads share,
 * and an arriving connection wakes every thread that sleeps. With --exclusive
 * it wakes one. With --reuseport each thread has a listener of its own, and
 * takes the connections that arrive on its CPU.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/server.h"

enum { MAX_EVENTS = 256 };

struct connection {
	int fd;
	int begin, end;		/* bytes of buffer[] still to be written */
	char buffer[] SERVER_ALIGNED;
};

static void watch(int epoll, int how, struct connection *c, unsigned int events)
{
	struct epoll_event event = { .events = events, .data.ptr = c };

	if (epoll_ctl(epoll, how, c->fd, &event))
		server_fail("epoll_ctl", errno);
}

static void end_connection(struct connection *c)
{
	close(c->fd);		/* leaves the epoll set with it */
	server_connection_put(c);
}

/* Returns false if there was none. */
static bool accept_one(int epoll, const struct server_thread *thread)
{
	int fd = accept4(thread->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	struct connection *c;

	if (fd < 0)		/* another thread was faster, or no descriptor is left */
		return false;
	c = server_connection_get(sizeof(*c) + thread->options->buffer);
	if (!c) {
		close(fd);
		return true;
	}
	c->fd = fd;
	c->begin = c->end = 0;
	watch(epoll, EPOLL_CTL_ADD, c, EPOLLIN);
	return true;
}

/* Returns false if the connection has ended. */
static bool write_out(struct connection *c)
{
	ssize_t count = write(c->fd, c->buffer + c->begin, c->end - c->begin);

	if (count < 0)
		return errno == EAGAIN;
	c->begin += count;
	return true;
}

static void serve(int epoll, struct connection *c, int buffer)
{
	bool was_full = c->begin < c->end;
	ssize_t count;

	if (!was_full) {
		count = read(c->fd, c->buffer, buffer);
		if (count < 0 && errno == EAGAIN)
			return;
		if (count <= 0) {
			end_connection(c);
			return;
		}
		c->begin = 0;
		c->end = count;
	}
	if (!write_out(c)) {
		end_connection(c);
		return;
	}
	if (was_full != (c->begin < c->end))
		watch(epoll, EPOLL_CTL_MOD, c, was_full ? EPOLLIN : EPOLLOUT);
}

static void run(struct server_thread *thread)
{
	const struct server_options *o = thread->options;
	struct connection *listener = calloc(1, sizeof(*listener));
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event events[MAX_EVENTS];

	if (epoll < 0 || !listener)
		server_fail("epoll_create1", errno);
	listener->fd = thread->listener;
	watch(epoll, EPOLL_CTL_ADD, listener, EPOLLIN | (o->exclusive ? EPOLLEXCLUSIVE : 0));
	server_ready();
	for (;;) {
		int count = epoll_wait(epoll, events, MAX_EVENTS, -1);

		for (int i = 0; i < count; i++) {
			struct connection *c = events[i].data.ptr;

			if (c != listener)
				serve(epoll, c, o->buffer);
			else if (o->reuseport)
				while (accept_one(epoll, thread))
					;
			else	/* the others want some, too */
				accept_one(epoll, thread);
		}
	}
}

int main(int argc, char **argv)
{
	return server_main(argc, argv, "Echo server: epoll.", run);
}
