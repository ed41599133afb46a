/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * MegaPipe: how an operation ends, or waits. For io.c and light.c; inline, for it is
 * done for every message.
 */
#ifndef MEGAPIPE_OPERATION_H
#define MEGAPIPE_OPERATION_H

#include "batch.h"
#include "tcp.h"

static __always_inline void mp_complete(struct mp_handle *h, struct mp_completion c)
{
	c.handle = h->number;
	c.cookie = h->cookie;
	mp_post(h->channel, c);
}

static __always_inline void mp_read_done(struct mp_handle *h, int result)
{
	struct mp_completion c = { .op = MP_OP_READ, .result = result };

	h->pending &= ~EPOLLIN;
	mp_complete(h, c);
}

/* What poll() would say of @events, EPOLLERR and EPOLLHUP included. */
static __always_inline __poll_t mp_events_of(const struct mp_handle *h, __poll_t events)
{
	if (h->light && events == EPOLLIN && likely(!mp_tcp_is_layered(h->sock->sk)))
		return mp_tcp_input(h->sock->sk);
	return h->kind->events(h, events);
}

/*
 * Make the handle ready when one of @events happens, or at once if one has
 * happened already. Returns 0, or a negative errno: it cannot be waited for.
 *
 * No event is lost in between: the handle is armed before the file is asked,
 * and whoever makes the file ready does so before it calls back.
 */
static __always_inline int mp_handle_wait(struct mp_handle *h, __poll_t events)
{
	__poll_t now;
	int ret;

	/*
	 * Only the owner arms, so that one which is neither armed nor on the
	 * list stays so, and is armed without the lock. Acquire: a callback that
	 * has just disarmed it has put it on the list before.
	 */
	if (likely(!smp_load_acquire(&h->armed) && list_empty(&h->link)))
		WRITE_ONCE(h->armed, events);
	else if (!mp_handle_arm_again(h, events))
		return 0;

	if (unlikely(!h->watched)) {
		ret = mp_handle_join(h);
		if (ret)
			return ret;
	}
	/* Armed before the file is asked. Pairs with the barrier in mp_handle_happened(). */
	smp_mb();
	now = mp_events_of(h, events);
	if (unlikely(now))
		mp_handle_is_ready(h, now);
	return 0;
}

/* After a try: wait for what is still pending. @room: the ring had some for it. */
static __always_inline void mp_settle(struct mp_handle *h, bool room)
{
	int ret;

	if (!h->pending)
		return;
	if (likely(room)) {
		ret = mp_handle_wait(h, h->pending);
		if (unlikely(ret))
			room = mp_give_up(h, ret);
	}
	if (unlikely(!room))
		mp_handle_make_ready(h, h->pending);
}

#endif
