/*
 * The server of the paper's RPC-like test: one pinned thread per CPU with a
 * channel of its own. The loop is the paper's skeleton: ACCEPT -> register the
 * connection, read; READ -> write; WRITE -> read.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include "common/server.h"
#include "megapipe.h"

struct connection {
	int fd;			/* or an lwsocket, which its handle closes */
	char buffer[];
};

struct worker {
	const struct server_options *options;
	struct mp_channel *channel;
	int listener;		/* handle */
	bool full;		/* no descriptor is left: accept when one comes back */
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

static void accept_more(struct worker *w)
{
	const struct server_options *o = w->options;

	w->full = false;
	must("mp_accept", mp_accept(w->channel, w->listener, o->accepts, o->lwsocket));
}

static void end_connection(struct worker *w, const struct mp_event *event, struct connection *c)
{
	/* No operation is pending on it: each event here was that of the only one. */
	must("mp_unregister", mp_unregister(w->channel, event->handle));
	if (!mp_is_lwsocket(c->fd))
		close(c->fd);
	server_connection_put(c);
	if (w->full)
		accept_more(w);
}

static void accepted(struct worker *w, const struct mp_event *event)
{
	struct connection *c;
	int handle;

	/* To ask again at once would only fail again. */
	w->full = event->result == -EMFILE || event->result == -ENFILE;
	if (!event->more && !w->full)
		accept_more(w);
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
	handle = mp_register(w->channel, c->fd, c, NULL, 0);
	must("mp_register", handle);
	must("mp_read", mp_read(w->channel, handle, c->buffer, w->options->buffer));
}

static void serve(struct worker *w, const struct mp_event *event)
{
	struct connection *c = event->cookie;

	switch (event->op) {
	case MP_OP_ACCEPT:
		accepted(w, event);
		break;
	case MP_OP_READ:
		if (event->result > 0)
			must("mp_write",
			     mp_write(w->channel, event->handle, c->buffer, event->result));
		else if (event->result == 0)
			must("mp_disconnect", mp_disconnect(w->channel, event->handle));
		else
			end_connection(w, event, c);
		break;
	case MP_OP_WRITE:
		if (event->result > 0 && !event->error)
			read_more(w, event, c);
		else
			end_connection(w, event, c);
		break;
	case MP_OP_DISCONNECT:
		end_connection(w, event, c);
		break;
	default:
		server_fail("unexpected event", -event->result);
	}
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
	cpu_set_t mask;

	if (!w.channel)
		server_fail("mp_create", errno);
	CPU_ZERO(&mask);
	CPU_SET(thread->index, &mask);
	w.listener = mp_register(w.channel, thread->listener, NULL, &mask, sizeof(mask));
	must("mp_register", w.listener);
	accept_more(&w);
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
