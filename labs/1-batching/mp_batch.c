// SPDX-License-Identifier: GPL-2.0-only
/*
 * Lab 1, kernel side: requests and completions cross in batches.
 *
 * You write the functions below; kernel/megapipe/batch.h says when each is
 * called and what you may call, kernel/megapipe/batch_plain.c is the plain way
 * that you replace. The module calls your functions for channels that were
 * created with MP_BATCH, and the plain ones for all others.
 *
 * What a lock, a shared cache line or a wake-up costs is paid per call of the
 * function that takes, writes or makes it. Batching means: once per crossing.
 */
#include "batch.h"

/* STUDENT: take every request that waits, as far as their completions have room. */
static u32 batched_drain(struct mp_channel *ch)
{
	/* BEGIN SOLUTION */
	u32 waiting = mp_sq_waiting(ch);
	struct mp_request req;
	u32 taken = 0;

	/*
	 * Each request may complete at once, and an accept with several
	 * completions: ask for room anew each time. What has to stay is taken
	 * by a later crossing, in order.
	 */
	while (taken < waiting && mp_cq_room(ch)) {
		mp_sq_read(ch, taken, &req);
		mp_execute(ch, &req);
		taken++;
	}
	mp_sq_advance(ch, taken);
	mp_cq_publish(ch);
	return taken;
	/* ELSE STARTER */
	//| return mp_plain_ops.drain(ch);
	/* END SOLUTION */
}

/* BEGIN SOLUTION */
/* Move the whole list of ready handles to @batch; returns how many there are. */
static u32 take_ready(struct mp_channel *ch, struct list_head *batch)
{
	u32 count;

	/* Callbacks take this lock in interrupts: with them on, it would wait for itself. */
	spin_lock_irq(&ch->lock);
	list_splice_init(&ch->ready, batch);
	count = ch->nr_ready;
	ch->nr_ready = 0;
	spin_unlock_irq(&ch->lock);
	return count;
}

/* Put the @count handles of @batch back, in front of those that have come meanwhile. */
static void return_ready(struct mp_channel *ch, struct list_head *batch, u32 count)
{
	spin_lock_irq(&ch->lock);
	list_splice(batch, &ch->ready);
	ch->nr_ready += count;
	spin_unlock_irq(&ch->lock);
}

/* END SOLUTION */
/* STUDENT: run every handle that is ready, taking the lock once for all of them. */
static u32 batched_complete(struct mp_channel *ch)
{
	/* BEGIN SOLUTION */
	LIST_HEAD(batch);
	struct mp_handle *h;
	u32 left;

	if (mp_ready_count(ch) && mp_cq_room(ch)) {
		left = take_ready(ch, &batch);
		while (left && mp_cq_room(ch)) {
			h = list_first_entry(&batch, struct mp_handle, link);
			mp_run(h);
			left--;
		}
		/* The ring is full: the rest stays ready, in its order. */
		if (left)
			return_ready(ch, &batch, left);
		mp_cq_publish(ch);
	}
	return mp_cq_filled(ch);
	/* ELSE STARTER */
	//| return mp_plain_ops.complete(ch);
	/* END SOLUTION */
}

/* STUDENT: sleep until a handle is ready. From ch->sleeping on, batched_wake() must wake. */
static int batched_sleep(struct mp_channel *ch, ktime_t *deadline)
{
	/* BEGIN SOLUTION */
	int ret = 0;

	/* Whoever sees the flag wakes, so the state comes first: no wake-up before it counts. */
	set_current_state(TASK_INTERRUPTIBLE);
	WRITE_ONCE(ch->sleeping, 1);
	/*
	 * The flag must be seen before the list is looked at. Pairs with the
	 * barrier in batched_wake(): of the two sides at least one sees what
	 * the other wrote, so a handle never arrives unnoticed.
	 */
	smp_mb();
	if (mp_ready_count(ch))
		ret = -EAGAIN;
	else if (!mp_schedule(deadline))
		ret = -ETIME;
	/* The owner runs: until it sleeps next time nobody need wake it. */
	__set_current_state(TASK_RUNNING);
	WRITE_ONCE(ch->sleeping, 0);
	return ret;
	/* ELSE STARTER */
	//| return mp_plain_ops.sleep(ch, deadline);
	/* END SOLUTION */
}

/* STUDENT: a handle became ready. Wake the owner only if it sleeps, and only once. */
static void batched_wake(struct mp_channel *ch)
{
	/* BEGIN SOLUTION */
	/* The handle is on the list before the flag is read; see batched_sleep(). */
	smp_mb();
	/* Of several callbacks at a time, the one that clears the flag wakes. */
	if (READ_ONCE(ch->sleeping) && xchg(&ch->sleeping, 0))
		mp_wake_owner(ch);
	/* ELSE STARTER */
	//| mp_plain_ops.wake(ch);
	/* END SOLUTION */
}

const struct mp_batch_ops mp_batched_ops = {
	.drain		= batched_drain,
	.complete	= batched_complete,
	.sleep		= batched_sleep,
	.wake		= batched_wake,
};
