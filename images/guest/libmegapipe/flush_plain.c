/*
 * Without batching: every request crosses by itself, and so does every call for
 * an event. It is right, and slow.
 */
#include "flush.h"

static int plain_queued(struct mp_channel *ch)
{
	int ret = mp_cross(ch, MP_ENTER_SUBMIT, 0);

	return ret < 0 ? ret : 0;
}

static int plain_next(struct mp_channel *ch, int timeout_ms)
{
	/* A request may have had to stay while completions filled their ring. */
	unsigned int flags = mp_requests_waiting(ch) ? MP_ENTER_SUBMIT : 0;
	int ret;

	/* Of several, only the last may sleep: it may be the one that brings the event. */
	while (mp_requests_waiting(ch) > 1 && !mp_completions_waiting(ch)) {
		ret = mp_cross(ch, MP_ENTER_SUBMIT, 0);
		if (ret < 0)
			return ret;
		if (!ret)
			break;
	}
	ret = mp_cross(ch, flags | MP_ENTER_WAIT, timeout_ms);
	return ret < 0 ? ret : mp_completions_waiting(ch) > 0;
}

const struct mp_flush_ops mp_plain_flush = {
	.queued	= plain_queued,
	.next	= plain_next,
};
