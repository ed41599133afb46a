/*
 * The server of the paper's RPC-like test: one pinned thread per CPU with a
 * channel of its own. The loop is the paper's skeleton: ACCEPT -> register the
 * connection, read; READ -> write; WRITE -> read.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/server.h"
#include "megapipe.h"

struct connection {
	int fd;			/* or an lwsocket, which its handle closes */
	int messages;
	bool leaves;		/* its channel, with the next message */
	int length, room;	/* then: bytes to be returned, and room for so many */
	char buffer[] SERVER_ALIGNED;
};

struct worker {
	const struct server_options *options;
	struct mp_channel *channel;
	int full[2];		/* listeners to ask again when a descriptor comes back */
	int nr_full;
	int nr_converted;
};

/* A call on a channel fails only when the channel itself is lost. */
static void must(const char *what, int result)
{
	if (result < 0)
		server_fail(what, -result);
}

static void read_more(struct worker *w, const struct mp_event *event, struct connection *c)
{
	must("mp_read", mp_read(w->channel, event->handle, c->buffer, w->options->buffer));
}

static void accept_from(struct worker *w, int listener)
{
	const struct server_options *o = w->options;

	must("mp_accept", mp_accept(w->channel, listener, o->accepts, o->lwsocket));
}

static void accept_more(struct worker *w)
{
	while (w->nr_full)
		accept_from(w, w->full[--w->nr_full]);
}

static void end_connection(struct worker *w, const struct mp_event *event, struct connection *c)
{
	/* No operation is pending on it: each event here was that of the only one. */
	must("mp_unregister", mp_unregister(w->channel, event->handle));
	if (!mp_is_lwsocket(c->fd))
		close(c->fd);
	server_connection_put(c);
	accept_more(w);
}

/* What every descriptor can: poll() wakes whoever waits, with no channel in between. */
static void *serve_alone(void *argument)
{
	struct connection *c = argument;
	struct pollfd ready = { .fd = c->fd };
	ssize_t moved;
	int sent = 0;

	for (;;) {
		bool sending = sent < c->length;

		if (sending)
			moved = send(c->fd, c->buffer + sent, c->length - sent, MSG_DONTWAIT);
		else
			moved = recv(c->fd, c->buffer, c->room, MSG_DONTWAIT);
		if (moved < 0 && (errno == EAGAIN || errno == EINTR)) {
			ready.events = sending ? POLLOUT : POLLIN;
			poll(&ready, 1, -1);
		} else if (moved <= 0) {
			break;
		} else if (sending) {
			sent += moved;
		} else {
			c->length = moved;
			sent = 0;
		}
	}
	close(c->fd);
	free(c);
	return NULL;
}

/* Nothing is pending on the handle: its only operation has just been done. */
static void leave(struct worker *w, const struct mp_event *event, struct connection *c)
{
	pthread_t thread;
	int error;

	must("mp_unregister", mp_unregister(w->channel, event->handle));
	must("mp_flush", mp_flush(w->channel));
	c->length = event->result;
	c->room = w->options->buffer;
	error = pthread_create(&thread, NULL, serve_alone, c);
	if (error)
		server_fail("pthread_create", error);
	pthread_detach(thread);
}

static void accepted(struct worker *w, const struct mp_event *event)
{
	struct connection *c;
	int handle;

	/* To ask again at once would only fail again. */
	if (event->result == -EMFILE || event->result == -ENFILE)
		w->full[w->nr_full++] = event->handle;
	else if (!event->more)
		accept_from(w, event->handle);
	if (event->result < 0)	/* or aborted meanwhile */
		return;
	c = server_connection_get(sizeof(*c) + w->options->buffer);
	if (!c) {
		if (mp_is_lwsocket(event->result))
			must("mp_drop", mp_drop(w->channel, event->result));
		else
			close(event->result);
		return;
	}
	c->fd = event->result;
	c->messages = 0;
	c->leaves = false;
	handle = mp_register(w->channel, c->fd, c, NULL, 0);
	must("mp_register", handle);
	must("mp_read", mp_read(w->channel, handle, c->buffer, w->options->buffer));
}

/* What an ordinary call takes of an answer need not go through the channel. */
static void answer(struct worker *w, const struct mp_event *event, struct connection *c)
{
	bool converted = w->options->convert && !mp_is_lwsocket(c->fd);
	ssize_t sent = converted ? send(c->fd, c->buffer, event->result, MSG_DONTWAIT) : 0;

	if (sent < 0)		/* the write will tell why */
		sent = 0;
	if (sent == event->result)
		read_more(w, event, c);
	else
		must("mp_write", mp_write(w->channel, event->handle, c->buffer + sent,
					  event->result - sent));
}

/* The read is pending when the connection is converted, and its message may arrive just then. */
static void answered(struct worker *w, const struct mp_event *event, struct connection *c)
{
	read_more(w, event, c);
	if (++c->messages == w->options->convert && mp_is_lwsocket(c->fd))
		must("mp_convert", mp_convert(w->channel, event->handle));
}

static void serve(struct worker *w, const struct mp_event *event)
{
	struct connection *c = event->cookie;

	switch (event->op) {
	case MP_OP_ACCEPT:
		accepted(w, event);
		break;
	case MP_OP_READ:
		if (event->result > 0 && c->leaves)
			leave(w, event, c);
		else if (event->result > 0)
			answer(w, event, c);
		else if (event->result == 0)
			must("mp_disconnect", mp_disconnect(w->channel, event->handle));
		else
			end_connection(w, event, c);
		break;
	case MP_OP_WRITE:
		if (event->result > 0 && !event->error)
			answered(w, event, c);
		else
			end_connection(w, event, c);
		break;
	case MP_OP_CONVERT:
		must("mp_convert", event->result);
		c->fd = event->result;
		c->leaves = w->options->leave && w->nr_converted++ % 2;
		break;
	case MP_OP_DISCONNECT:
		end_connection(w, event, c);
		break;
	default:
		server_fail("unexpected event", -event->result);
	}
}

/* @cpus: those of a part, or NULL. Returns the handle; a failure is its first event. */
static int register_listener(struct worker *w, int fd, const cpu_set_t *cpus)
{
	int handle = mp_register(w->channel, fd, NULL, cpus, cpus ? sizeof(*cpus) : 0);

	must("mp_register", handle);
	return handle;
}

static void must_be_refused(struct worker *w, int fd, const cpu_set_t *cpus)
{
	int handle = register_listener(w, fd, cpus);
	struct mp_event event;

	if (mp_dispatch(w->channel, &event, 1000) != 1 || event.handle != handle ||
	    event.op != MP_OP_REGISTER || event.result != -EBUSY)
		server_fail("a second part with the same CPU is not refused", EEXIST);
	must("mp_unregister", mp_unregister(w->channel, handle));
}

static void listen_to_part(struct worker *w, const struct server_thread *thread)
{
	const struct server_options *o = w->options;
	cpu_set_t cpu, every;
	int listener;

	CPU_ZERO(&cpu);
	CPU_SET(thread->index, &cpu);
	for (int i = 0; i < o->cycles; i++) {
		listener = register_listener(w, thread->listener, &cpu);
		must("mp_unregister", mp_unregister(w->channel, listener));
		must("mp_flush", mp_flush(w->channel));
	}
	listener = register_listener(w, thread->listener, &cpu);
	if (o->overlap) {
		for (int i = 0; i < CPU_SETSIZE; i++)
			CPU_SET(i, &every);
		must("mp_flush", mp_flush(w->channel));
		must_be_refused(w, thread->listener, &cpu);
		must_be_refused(w, thread->listener, &every);
	}
	accept_from(w, listener);
}

static void run(struct server_thread *thread)
{
	const struct server_options *o = thread->options;
	struct mp_options options = {
		.flags = (o->batch ? MP_BATCH : 0) | (o->partition ? MP_PARTITION : 0) |
			 (o->lwsocket ? MP_LWSOCKET : 0),
		.threshold = o->threshold,
		.requests = o->requests,
		.completions = o->completions,
	};
	struct worker w = { .options = o, .channel = mp_create(&options) };

	if (!w.channel)
		server_fail("mp_create", errno);
	listen_to_part(&w, thread);
	if (o->rest && thread->index == 0)
		accept_from(&w, register_listener(&w, thread->listener, NULL));
	must("mp_flush", mp_flush(w.channel));
	server_ready();
	for (;;) {
		struct mp_event event;
		int ret = mp_dispatch(w.channel, &event, -1);

		if (ret == -EINTR)
			continue;
		must("mp_dispatch", ret);
		serve(&w, &event);
	}
}

int main(int argc, char **argv)
{
	return server_main(argc, argv, "Echo server: MegaPipe.", run);
}
