/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * MegaPipe: what poll() would say of a TCP socket, at a fraction of its cost. As
 * with poll(), nothing is lost if the caller has armed the handle before. And when
 * there is nothing left to do but to say why.
 */
#ifndef MEGAPIPE_TCP_H
#define MEGAPIPE_TCP_H

#include <linux/tcp.h>
#include <net/inet_connection_sock.h>

#include "channel.h"

/* Does a layer on top of TCP (TLS, BPF) keep what there is to read elsewhere? Rare. */
static __always_inline bool mp_tcp_is_layered(const struct sock *sk)
{
	return READ_ONCE(sk->sk_prot)->sock_is_readable;
}

/* EPOLLIN and EPOLLERR of a connection that is not layered. */
static __always_inline __poll_t mp_tcp_input(const struct sock *sk)
{
	__poll_t now = 0;

	if (!skb_queue_empty_lockless(&sk->sk_receive_queue) ||
	    READ_ONCE(sk->sk_shutdown) & RCV_SHUTDOWN || inet_sk_state_load(sk) == TCP_CLOSE)
		now |= EPOLLIN;
	/* Not what is on the error queue (time stamps, say), which is not for an operation. */
	if (READ_ONCE(sk->sk_err))
		now |= EPOLLERR;
	return now;
}

/*
 * All over: nothing can arrive any more, and what is left is to say why. Not after the
 * end of the stream, which recv() goes on to report, whatever came later.
 */
static __always_inline bool mp_tcp_is_over(const struct sock *sk)
{
	return unlikely(inet_sk_state_load(sk) == TCP_CLOSE) && READ_ONCE(sk->sk_err) &&
	       !sock_flag(sk, SOCK_DONE) &&
	       skb_queue_empty_lockless(&sk->sk_receive_queue) && !mp_tcp_is_layered(sk);
}

#endif
