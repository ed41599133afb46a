/*
 * Lab 1, library side: when does libmegapipe cross into the kernel?
 *
 * You write the two functions below; images/guest/libmegapipe/flush.h says when
 * each is called and what you may call, flush_plain.c beside it is the plain
 * way that you replace. The paper's policy: requests go down when mp_threshold()
 * of them have gathered, or when the application asks for an event and none is
 * left to hand out. (mp_flush() sends them down at any time; it is given.)
 */
#include "flush.h"

/* BEGIN SOLUTION */
/* Cross with what has gathered, and note what found no room. */
static int cross(struct mp_channel *ch, unsigned int flags, int timeout_ms)
{
	int ret = mp_cross(ch, flags, timeout_ms);

	ch->left = mp_requests_waiting(ch);
	return ret;
}

/* END SOLUTION */
/* STUDENT: a request was put into the ring. Cross only when enough have gathered. */
static int batched_queued(struct mp_channel *ch)
{
	/* BEGIN SOLUTION */
	int ret;

	/* What the last crossing left has to wait for room: it is no reason for another. */
	if (mp_requests_waiting(ch) < ch->left + mp_threshold(ch))
		return 0;
	ret = cross(ch, MP_ENTER_SUBMIT, 0);
	return ret < 0 ? ret : 0;
	/* ELSE STARTER */
	//| return mp_plain_flush.queued(ch);
	/* END SOLUTION */
}

/* STUDENT: the application wants an event. Cross only when none is in the ring. */
static int batched_next(struct mp_channel *ch, int timeout_ms)
{
	/* BEGIN SOLUTION */
	unsigned int flags = MP_ENTER_WAIT;
	int ret;

	if (mp_completions_waiting(ch))
		return 1;
	/* What has gathered goes down now, in the same crossing: else nothing may come. */
	if (mp_requests_waiting(ch))
		flags |= MP_ENTER_SUBMIT;
	ret = cross(ch, flags, timeout_ms);
	return ret < 0 ? ret : mp_completions_waiting(ch) > 0;
	/* ELSE STARTER */
	//| return mp_plain_flush.next(ch, timeout_ms);
	/* END SOLUTION */
}

const struct mp_flush_ops mp_batched_flush = {
	.queued	= batched_queued,
	.next	= batched_next,
};
