// SPDX-License-Identifier: GPL-2.0-only
/*
 * Batching that saves all crossings: the kernel answers in the server's place.
 * Nothing of what it reads ever gets to the server.
 */
#include "batch.h"

/* Turn what was completed from @first on into the server's next requests. */
static void answer(struct mp_channel *ch, u32 first)
{
	u32 mask = ch->cq_entries - 1, kept = first, i;

	for (i = first; i != ch->cq_tail; i++) {
		struct mp_completion c = ch->cq[i & mask];
		struct mp_handle *h = ch->handles[c.handle];
		struct mp_request req = { .handle = c.handle };

		if (h && c.op == MP_OP_READ && c.result > 0) {
			req.op = MP_OP_WRITE;
			req.addr = h->read_addr;
			req.len = c.result;
			mp_execute(ch, &req);
		} else if (h && c.op == MP_OP_WRITE && c.result > 0 && !c.error) {
			req.op = MP_OP_READ;
			req.addr = h->read_addr;
			req.len = h->read_len;
			mp_execute(ch, &req);
		} else {
			ch->cq[kept++ & mask] = c;
		}
	}
	ch->cq_tail = kept;
}

static u32 echo_drain(struct mp_channel *ch)
{
	u32 waiting = mp_sq_waiting(ch), first = ch->cq_tail, taken = 0;
	struct mp_request req;

	while (taken < waiting && mp_cq_room(ch)) {
		mp_sq_read(ch, taken, &req);
		mp_execute(ch, &req);
		taken++;
	}
	mp_sq_advance(ch, taken);
	answer(ch, first);
	mp_cq_publish(ch);
	return taken;
}

static u32 echo_complete(struct mp_channel *ch)
{
	u32 first = ch->cq_tail, left = mp_ready_count(ch);
	struct mp_handle *h;

	while (left-- && mp_cq_room(ch)) {
		h = mp_ready_pop(ch);
		if (h)
			mp_run(h);
	}
	answer(ch, first);
	mp_cq_publish(ch);
	return mp_cq_filled(ch);
}

static int echo_sleep(struct mp_channel *ch, ktime_t *deadline)
{
	return mp_plain_ops.sleep(ch, deadline);
}

static void echo_wake(struct mp_channel *ch)
{
	mp_wake_owner(ch);
}

const struct mp_batch_ops mp_batched_ops = {
	.drain		= echo_drain,
	.complete	= echo_complete,
	.sleep		= echo_sleep,
	.wake		= echo_wake,
};
