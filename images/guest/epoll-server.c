/*
 * The baseline of the paper: one listening socket that all threads share, one
 * pinned thread per CPU, each with its own epoll set that holds the listener
 * and the connections which this thread has accepted. Level-triggered, no
 * EPOLLEXCLUSIVE: an arriving connection wakes every thread that sleeps.
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
	char buffer[];
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
	free(c);
}

static void accept_one(int epoll, const struct server_thread *thread)
{
	int fd = accept4(thread->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	struct connection *c;

	if (fd < 0)		/* another thread was faster, or no descriptor is left */
		return;
	c = malloc(sizeof(*c) + thread->options->buffer);
	if (!c) {
		close(fd);
		return;
	}
	c->fd = fd;
	c->begin = c->end = 0;
	watch(epoll, EPOLL_CTL_ADD, c, EPOLLIN);
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
	struct connection *listener = calloc(1, sizeof(*listener));
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event events[MAX_EVENTS];

	if (epoll < 0 || !listener)
		server_fail("epoll_create1", errno);
	listener->fd = thread->listener;
	watch(epoll, EPOLL_CTL_ADD, listener, EPOLLIN);
	server_ready();
	for (;;) {
		int count = epoll_wait(epoll, events, MAX_EVENTS, -1);

		for (int i = 0; i < count; i++) {
			struct connection *c = events[i].data.ptr;

			if (c == listener)
				accept_one(epoll, thread);
			else
				serve(epoll, c, thread->options->buffer);
		}
	}
}

int main(int argc, char **argv)
{
	return server_main(argc, argv, "Echo server: epoll with one shared listener.", run);
}
