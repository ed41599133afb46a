/*
 * The interface behind which libmegapipe decides when to cross into the kernel.
 *
 * Putting a request into the ring and taking a completion out are plain memory
 * accesses. What costs is the crossing, mp_cross(): one system call. A policy
 * says when to make it.
 */
#ifndef MEGAPIPE_FLUSH_H
#define MEGAPIPE_FLUSH_H

#include "channel.h"

struct mp_flush_ops {
	/*
	 * A request has just been put into the ring. Returns 0 or the negative
	 * errno of a crossing.
	 */
	int (*queued)(struct mp_channel *ch);

	/*
	 * The application asks for an event. Make sure that one is in the ring
	 * of completions, waiting up to @timeout_ms for it. Returns 1 if one
	 * is, 0 if the time is over, or the negative errno of a crossing.
	 */
	int (*next)(struct mp_channel *ch, int timeout_ms);
};

extern const struct mp_flush_ops mp_plain_flush;	/* flush_plain.c */
extern const struct mp_flush_ops mp_batched_flush;	/* the lab's mp_flush.c */

/* Requests that are in the ring and that the kernel has not taken. */
static inline unsigned int mp_requests_waiting(const struct mp_channel *ch)
{
	/* Acquire: a slot is used again only after the kernel has copied it. */
	return ch->sq_tail - __atomic_load_n(&ch->shared->sq_head, __ATOMIC_ACQUIRE);
}

/* Completions that are in the ring and that the application has not had. */
static inline unsigned int mp_completions_waiting(const struct mp_channel *ch)
{
	/* Acquire: completions below cq_tail are read after it. */
	return __atomic_load_n(&ch->shared->cq_tail, __ATOMIC_ACQUIRE) - ch->cq_head;
}

/* How many requests shall gather before they go down (mp_options.threshold). */
static inline unsigned int mp_threshold(const struct mp_channel *ch)
{
	return ch->threshold;
}

/*
 * Cross into the kernel. @flags: MP_ENTER_SUBMIT to have requests taken,
 * MP_ENTER_WAIT to wait up to @timeout_ms for a completion; or both. Returns
 * how many requests were taken, or a negative errno: -EINTR, -EPERM, -EBADMSG.
 */
int mp_cross(struct mp_channel *ch, unsigned int flags, int timeout_ms);

#endif
