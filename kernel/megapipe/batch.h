/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * MegaPipe: the interface behind which batching happens.
 *
 * A crossing (ioctl MP_IOC_ENTER) calls ->drain() to take requests from the
 * ring and ->complete() to turn handles that have become ready into
 * completions. Between crossings, wake-up callbacks of sockets put handles on
 * the channel's list of ready handles and call ->wake().
 *
 * Everything declared here is checked: indices and requests come from the
 * kernel's own copies, whatever user space scribbles over the rings meanwhile.
 */
#ifndef MEGAPIPE_BATCH_H
#define MEGAPIPE_BATCH_H

#include <linux/ktime.h>
#include <linux/list.h>
#include <linux/types.h>

#include "channel.h"

struct mp_batch_ops {
	/*
	 * Owner. Take requests from the ring and execute them. Returns how many
	 * were taken. May sleep until it executes the first one: see mp_execute().
	 */
	u32 (*drain)(struct mp_channel *ch);

	/*
	 * Owner. Run ready handles and make their completions visible. Returns
	 * how many completions the user can now take out, those of earlier
	 * crossings included. May sleep until it runs the first one: see mp_run().
	 */
	u32 (*complete)(struct mp_channel *ch);

	/*
	 * Owner: sleep until a handle is ready, a signal has come or @deadline
	 * (NULL: never) has passed. Returns 0 after having slept, -EAGAIN
	 * without if a handle is ready already, or -ETIME when the deadline has
	 * passed. The owner returns in the state TASK_RUNNING.
	 *
	 * No wake-up may be lost: ->wake() wakes whoever it does not know to
	 * be awake.
	 */
	int (*sleep)(struct mp_channel *ch, ktime_t *deadline);

	/*
	 * Any CPU, any context, interrupts off: a handle has just been put on
	 * the list of ready handles.
	 */
	void (*wake)(struct mp_channel *ch);
};

extern const struct mp_batch_ops mp_plain_ops;		/* batch_plain.c */
extern const struct mp_batch_ops mp_batched_ops;	/* the lab's mp_batch.c */

/* --- requests: for ->drain() ------------------------------------------------ */

/* How many requests wait in the ring. */
static inline u32 mp_sq_waiting(const struct mp_channel *ch)
{
	return ch->sq_tail - ch->sq_head;
}

/* Copy the request @ahead places behind the next one; @ahead < mp_sq_waiting(). */
static inline void mp_sq_read(const struct mp_channel *ch, u32 ahead, struct mp_request *req)
{
	/* The user may still be writing to it: take one copy, use only that. */
	*req = ch->sq[(ch->sq_head + ahead) & (ch->sq_entries - 1)];
	barrier();
}

/*
 * Take the next @count requests out of the ring: their slots belong to the
 * user again. This writes a cache line that the user reads.
 */
void mp_sq_advance(struct mp_channel *ch, u32 count);

/*
 * Execute a request: try it at once, and if it would block, leave it pending
 * on its handle. Needs mp_cq_room() > 0, because a request may complete (or
 * fail) at once, with at most one completion; an accept of many makes as many
 * as there is room for and goes on later.
 *
 * May sleep. May also leave softirqs off, so that packets for the next request wait;
 * they are on again when ->drain() has returned. Do not sleep in between.
 */
void mp_execute(struct mp_channel *ch, const struct mp_request *req);

/* --- completions: for ->complete() ------------------------------------------ */

/* How many completions the user has not taken out yet, visible or not. */
static inline u32 mp_cq_filled(const struct mp_channel *ch)
{
	return ch->cq_tail - ch->cq_head;
}

/* How many more completions fit into the ring. */
static inline u32 mp_cq_room(const struct mp_channel *ch)
{
	return ch->cq_entries - mp_cq_filled(ch);
}

/*
 * Make every completion written so far visible to the user. This writes a
 * cache line that the user reads.
 */
void mp_cq_publish(struct mp_channel *ch);

/* --- ready handles ----------------------------------------------------------
 *
 * The list is ch->ready, in the order in which the handles became ready; they
 * are linked through mp_handle.link, and ch->nr_ready says how many there are.
 * ch->lock guards both. Wake-up callbacks take it in interrupts: elsewhere it
 * is taken with spin_lock_irq(). No handle goes while ->complete() runs.
 *
 * Whoever takes handles off the list may keep them, still linked to each other,
 * on a list of its own until it returns: none of them becomes ready meanwhile.
 */

/* How many handles are on the list. Takes no lock: more may come any time. */
static inline u32 mp_ready_count(const struct mp_channel *ch)
{
	return READ_ONCE(ch->nr_ready);
}

/* Take the handle that has been ready longest off the list, or NULL. Locks. */
struct mp_handle *mp_ready_pop(struct mp_channel *ch);

/*
 * Take the handle out of the batch that it is in, if any, go on with what is
 * pending on it, and write the completions. Needs mp_cq_room() > 0. What finds no room, or still
 * cannot be done, stays pending, and the handle becomes ready again by itself.
 *
 * May sleep, and may leave softirqs off, as mp_execute(): until ->complete() has returned.
 */
void mp_run(struct mp_handle *h);

/* --- sleeping and waking ------------------------------------------------------ */

/*
 * Give the processor away, in the state that the caller has set, until somebody
 * wakes the owner, a signal comes or @deadline (NULL: never) passes. Returns
 * false if it has passed. In the state TASK_RUNNING it returns at once.
 */
bool mp_schedule(ktime_t *deadline);

/* Wake the thread that owns the channel. Costs a lock and perhaps an IPI. */
void mp_wake_owner(struct mp_channel *ch);

#endif
