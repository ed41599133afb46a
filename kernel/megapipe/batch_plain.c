// SPDX-License-Identifier: GPL-2.0-only
/*
 * MegaPipe without batching: one request per crossing, one completion per
 * dispatch, one wake-up per event. It is right, and slow.
 */
#include "batch.h"

static u32 plain_drain(struct mp_channel *ch)
{
	struct mp_request req;

	if (!mp_sq_waiting(ch) || !mp_cq_room(ch))
		return 0;
	mp_sq_read(ch, 0, &req);
	mp_sq_advance(ch, 1);
	mp_execute(ch, &req);
	mp_cq_publish(ch);
	return 1;
}

static u32 plain_complete(struct mp_channel *ch)
{
	/* One pass: a handle that is not done may be on the list again by now. */
	u32 left = mp_ready_count(ch);
	struct mp_handle *h;

	while (!mp_cq_filled(ch) && left--) {
		h = mp_ready_pop(ch);
		if (h)
			mp_run(h);
	}
	mp_cq_publish(ch);
	return mp_cq_filled(ch);
}

static int plain_sleep(struct mp_channel *ch, ktime_t *deadline)
{
	int ret = 0;

	/*
	 * A full barrier between the owner's state and the look at the list.
	 * Pairs with the wake-up: the callback adds to the list before it takes
	 * the owner's pi_lock and reads that state.
	 */
	set_current_state(TASK_INTERRUPTIBLE);
	if (mp_ready_count(ch))
		ret = -EAGAIN;
	else if (!mp_schedule(deadline))
		ret = -ETIME;
	__set_current_state(TASK_RUNNING);
	return ret;
}

static void plain_wake(struct mp_channel *ch)
{
	mp_wake_owner(ch);
}

const struct mp_batch_ops mp_plain_ops = {
	.drain		= plain_drain,
	.complete	= plain_complete,
	.sleep		= plain_sleep,
	.wake		= plain_wake,
};
