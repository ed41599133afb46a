// SPDX-License-Identifier: GPL-2.0-only
/*
 * MegaPipe: the short way of an lwsocket. What io.c does for every kind of file is
 * done here for short messages, as they come and go as a rule, and for reads that
 * have to wait for one; whatever is otherwise, in any respect, takes io.c's way,
 * which can do all of it.
 *
 * Short messages are moved under the spin lock of the socket, as TCP itself works
 * in softirq: a whole socket lock costs more than the bytes. Nothing can sleep
 * there; what would have to (a buffer that is not in memory, no memory left, a
 * memory cgroup that may have to be shrunk) is not done here.
 *
 * From one message to the next softirqs stay off. Packets that arrive while a batch
 * is being worked off would otherwise be received at once, a few at a time, each
 * time with an interrupt and a poll of the device: for every third message, at 4 CPUs
 * and 64 bytes. So they are received together, when the batch is done.
 */
#include <linux/bottom_half.h>
#include <linux/instrumented.h>
#include <linux/net.h>
#include <linux/uaccess.h>
#include <net/tcp.h>

#include "operation.h"

#define MP_SHORT	256	/* bytes */

/* As much must have been charged for the socket already: a packet with MP_SHORT bytes. */
#define MP_SHORT_CHARGED	2048

/* --- softirqs ---------------------------------------------------------------------- */

/* Steps (messages, reads that wait) with softirqs off: as many packets NAPI takes at a time. */
#define MP_QUIET	NAPI_POLL_WEIGHT

/* Softirqs run again, at once if some have waited. */
void mp_quiet_end(struct mp_channel *ch)
{
	if (ch->quiet) {
		ch->quiet = 0;
		local_bh_enable();
	}
}

/* A step for which softirqs may be on or off. */
static __always_inline void mp_quiet_step(struct mp_channel *ch)
{
	if (ch->quiet && unlikely(ch->quiet++ >= MP_QUIET))
		mp_quiet_end(ch);
}

/* A step for which they must be off. */
static __always_inline void mp_quiet_begin(struct mp_channel *ch)
{
	mp_quiet_step(ch);
	if (!ch->quiet) {
		ch->quiet = 1;
		local_bh_disable();
	}
}

/* --- moving bytes ------------------------------------------------------------------- */

/* Take the spin lock of @sk, or return false: a task (ss -K, say) has locked the socket. */
static __always_inline bool mp_short_lock(struct mp_channel *ch, struct sock *sk)
{
	mp_quiet_begin(ch);
	spin_lock(&sk->sk_lock.slock);
	if (likely(!sock_owned_by_user(sk)))
		return true;
	spin_unlock(&sk->sk_lock.slock);
	return false;
}

static __always_inline void mp_short_unlock(struct sock *sk)
{
	spin_unlock(&sk->sk_lock.slock);
}

/* Where the @len bytes from @offset on, all of them in the first page, lie, or NULL. */
static noinline const void *mp_bytes_in_page(const struct sk_buff *skb, unsigned int offset,
					     size_t len)
{
	const skb_frag_t *first = skb_shinfo(skb)->frags;
	unsigned int linear = skb_headlen(skb);
	const void *bytes;

	if (offset < linear || !skb_shinfo(skb)->nr_frags || !skb_frags_readable(skb) ||
	    offset - linear + len > skb_frag_size(first))
		return NULL;
	bytes = skb_frag_address_safe(first);
	return bytes ? bytes + (offset - linear) : NULL;
}

/* Called by tcp_read_sock(): copy to the user; returns how many bytes, or -EAGAIN. */
static int mp_short_copy(read_descriptor_t *desc, struct sk_buff *skb, unsigned int offset,
			 size_t len)
{
	const void *from = skb->data + offset;

	len = min(len, desc->count);
	if (!len)
		return 0;
	/* In one piece, as a rule; what is not, nobody here can tell where it lies. */
	if (unlikely(offset + len > skb_headlen(skb))) {
		from = mp_bytes_in_page(skb, offset, len);
		if (!from)
			return -EAGAIN;
	}
	/* Whoever took the request has looked at the address. What came before a fault is copied again. */
	instrument_copy_to_user(desc->arg.buf, from, len);
	if (raw_copy_to_user(desc->arg.buf, from, len))
		return -EAGAIN;
	desc->arg.buf += len;
	desc->count -= len;
	return len;
}

/*
 * Nobody else reads from an lwsocket, so that there is something, or nobody would
 * ask. Returns how many bytes, 0 at the end of the stream, or an errno: it has to be
 * read in another way.
 */
static __always_inline int mp_short_read(struct mp_handle *h)
{
	struct sock *sk = h->sock->sk;
	read_descriptor_t *desc = &h->channel->read_desc;
	int ret = -EAGAIN;
	u32 from, there;

	if (!mp_short_lock(h->channel, sk))
		return ret;
	/* The end of the stream is in it, too, and counts as a byte. */
	from = tcp_sk(sk)->copied_seq;
	there = tcp_sk(sk)->rcv_nxt - from;
	/* Under the lock nobody puts a layer on top. */
	if (likely(there <= MP_SHORT && !mp_tcp_is_layered(sk))) {
		/* It need not look for more than there is. */
		desc->count = min(h->read_len, there);
		desc->arg.buf = u64_to_user_ptr(h->read_addr);
		pagefault_disable();
		ret = tcp_read_sock(sk, desc, mp_short_copy);
		pagefault_enable();
		if (likely(ret > 0))
			sk_peek_offset_bwd(sk, ret);
		else if (!ret && tcp_sk(sk)->copied_seq == from)
			ret = -EAGAIN;
	}
	mp_short_unlock(sk);
	return ret;
}

/* Returns how many bytes, or an errno; -EAGAIN, -EFAULT: not the short way. */
static __always_inline int mp_short_write(struct mp_handle *h, u64 addr, u32 len)
{
	struct msghdr *msg = &h->channel->write_msg;
	struct sock *sk = h->sock->sk;
	gfp_t allocation;
	int ret = -EAGAIN;
	int sndbuf;

	if (!mp_short_lock(h->channel, sk))
		return ret;
	if (likely(sk->sk_prot->sendmsg == tcp_sendmsg &&
		   sk->sk_forward_alloc >= MP_SHORT_CHARGED)) {
		msg->msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL;
		iov_iter_ubuf(&msg->msg_iter, ITER_SOURCE, u64_to_user_ptr(addr), len);
		/* Read and written under the socket's lock only. */
		allocation = sk->sk_allocation;
		sk->sk_allocation = GFP_ATOMIC | __GFP_NOWARN;
		sndbuf = sk->sk_sndbuf;
		pagefault_disable();
		ret = tcp_sendmsg_locked(sk, msg, len);
		pagefault_enable();
		sk->sk_allocation = allocation;
		/* What had no memory has shrunk it: the ordinary way, which may wait, decides. */
		if (unlikely(ret < 0))
			WRITE_ONCE(sk->sk_sndbuf, sndbuf);
	}
	mp_short_unlock(sk);
	return ret;
}

/* --- the operations ------------------------------------------------------------------ */

/* Returns false, and nothing has happened, if it has to be read in another way. */
static __always_inline bool mp_read_now(struct mp_handle *h)
{
	int ret = mp_short_read(h);

	if (unlikely(ret < 0))
		return false;
	mp_read_done(h, ret);
	return true;
}

/* Not inline, for then all requests would pay for its registers. */
static noinline bool mp_read_what_is_there(struct mp_handle *h)
{
	return mp_read_now(h);
}

/* The end of most connections: reset by the client, which has had its answers. */
static noinline bool mp_read_end(struct mp_handle *h)
{
	int error = mp_tcp_is_over(h->sock->sk) ? sock_error(h->sock->sk) : 0;

	mp_quiet_step(h->channel);
	if (!error)
		return false;
	mp_read_done(h, error);
	return true;
}

/* Returns false, and nothing has happened, if it is for io.c. */
static __always_inline bool mp_short_read_request(struct mp_handle *h,
						  const struct mp_request *req)
{
	if (h->pending & EPOLLIN)
		return false;
	h->read_addr = req->addr;
	h->read_len = req->len;
	if (!skb_queue_empty_lockless(&h->sock->sk->sk_receive_queue))
		return mp_read_what_is_there(h);
	/* As a rule nothing has come yet; what else there may be, waiting finds. */
	mp_quiet_step(h->channel);
	h->pending |= EPOLLIN;
	mp_settle(h, true);
	return true;
}

/* Likewise. */
static __always_inline bool mp_short_write_request(struct mp_handle *h,
						   const struct mp_request *req)
{
	int ret;

	if (h->pending & EPOLLOUT || req->len > MP_SHORT)
		return false;
	ret = mp_short_write(h, req->addr, req->len);
	if (unlikely(ret == -EAGAIN || ret == -EFAULT))
		return false;
	if (unlikely(ret >= 0 && ret < req->len)) {
		mp_quiet_end(h->channel);
		mp_write_rest(h, req, ret);
		return true;
	}
	/* All of it, as a rule. Any other error is told once, by whoever finds it first. */
	mp_complete(h, (struct mp_completion){ .op = MP_OP_WRITE, .result = ret });
	return true;
}

/* The handle of a read or write that may go the short way, or NULL. */
static __always_inline struct mp_handle *mp_short_handle(struct mp_channel *ch,
							 const struct mp_request *req)
{
	struct mp_handle *h;

	if (req->flags | req->reserved | req->fd | req->cookie)
		return NULL;
	h = mp_handle_find(ch, req->handle);
	if (!h || !h->light || !req->len || req->len > MAX_RW_COUNT ||
	    !access_ok(u64_to_user_ptr(req->addr), req->len) || !mp_cq_room(ch))
		return NULL;
	return h;
}

void mp_execute(struct mp_channel *ch, const struct mp_request *req)
{
	struct mp_handle *h = NULL;
	bool done = false;

	if (likely(req->op == MP_OP_READ || req->op == MP_OP_WRITE))
		h = mp_short_handle(ch, req);
	if (likely(h))
		done = req->op == MP_OP_READ ? mp_short_read_request(h, req) :
					       mp_short_write_request(h, req);
	if (unlikely(!done)) {
		mp_quiet_end(ch);
		mp_execute_any(ch, req);
	}
}

void mp_run(struct mp_handle *h)
{
	bool done = false;

	if (!list_empty(&h->link))	/* still linked in the caller's batch */
		list_del_init(&h->link);
	/* As a rule a message has come. Whatever it is, it is for the read. */
	if (likely(h->light && h->pending == EPOLLIN && mp_cq_room(h->channel)))
		done = skb_queue_empty_lockless(&h->sock->sk->sk_receive_queue) ?
			       mp_read_end(h) : mp_read_now(h);
	if (likely(done)) {
		h->events = 0;
	} else {
		mp_quiet_end(h->channel);
		mp_run_any(h);
	}
}
