// SPDX-License-Identifier: GPL-2.0-only
/*
 * MegaPipe: a socket whose connections will be like those of a listening one,
 * so that it can listen beside it (see partition.h).
 */
#include <linux/cpumask.h>
#include <linux/file.h>
#include <linux/ipv6.h>
#include <linux/net.h>
#include <linux/sockptr.h>
#include <linux/tcp.h>
#include <net/inet_connection_sock.h>
#include <net/inet_sock.h>
#include <net/ipv6.h>
#include <net/tcp.h>

#include "partition.h"

/* Options of a connection, which it inherits from its listener, in sk_flags. */
#define MP_INHERITED_FLAGS						\
	(BIT(SOCK_KEEPOPEN) | BIT(SOCK_URGINLINE) | BIT(SOCK_LINGER) |	\
	 BIT(SOCK_LOCALROUTE) | BIT(SOCK_ZEROCOPY) | BIT(SOCK_DBG))

/* Is there something that a copy of the options would not have? Locked. */
static bool mp_listener_is_special(const struct sock *sk)
{
	const struct tcp_sock *tp = tcp_sk(sk);

	if (sk->sk_reuseport || sk_is_mptcp(sk))
		return true;
	if (sk->sk_flags & SK_FLAGS_TIMESTAMP || sock_flag(sk, SOCK_RCVTSTAMP) ||
	    READ_ONCE(sk->sk_tsflags) || tp->tcp_tx_delay)
		return true;
#if IS_ENABLED(CONFIG_IPV6)
	if (sk->sk_family == AF_INET6 && rcu_access_pointer(inet6_sk(sk)->opt))
		return true;
#endif
	if (rcu_access_pointer(sk->sk_filter) || inet_csk(sk)->icsk_ulp_ops)
		return true;
#ifdef CONFIG_TCP_MD5SIG
	if (rcu_access_pointer(tp->md5sig_info))
		return true;
#endif
#ifdef CONFIG_TCP_AO
	if (rcu_access_pointer(tp->ao_info))
		return true;
#endif
	return inet_csk(sk)->icsk_accept_queue.fastopenq.max_qlen ||
	       rcu_access_pointer(inet_sk(sk)->inet_opt);
}

static void mp_copy_sock_options(struct sock *to, const struct sock *from)
{
	to->sk_flags |= from->sk_flags & MP_INHERITED_FLAGS;
	to->sk_userlocks = from->sk_userlocks;
	to->sk_rcvbuf = from->sk_rcvbuf;
	to->sk_sndbuf = from->sk_sndbuf;
	to->sk_rcvlowat = from->sk_rcvlowat;
	to->sk_rcvtimeo = from->sk_rcvtimeo;
	to->sk_sndtimeo = from->sk_sndtimeo;
	to->sk_lingertime = from->sk_lingertime;
	to->sk_priority = from->sk_priority;
	to->sk_mark = from->sk_mark;
	to->sk_max_pacing_rate = from->sk_max_pacing_rate;
	to->sk_pacing_status = from->sk_pacing_status;
	to->sk_txrehash = from->sk_txrehash;
	to->sk_bound_dev_if = from->sk_bound_dev_if;
	to->sk_incoming_cpu = from->sk_incoming_cpu;
	to->sk_max_ack_backlog = from->sk_max_ack_backlog;
#ifdef CONFIG_NET_RX_BUSY_POLL
	to->sk_ll_usec = from->sk_ll_usec;
	to->sk_prefer_busy_poll = from->sk_prefer_busy_poll;
	to->sk_busy_poll_budget = from->sk_busy_poll_budget;
#endif
}

static void mp_copy_inet_options(struct sock *to, const struct sock *from)
{
	struct inet_sock *inet = inet_sk(to);
	const struct inet_sock *old = inet_sk(from);

	inet->inet_flags = old->inet_flags;
	inet->uc_ttl = old->uc_ttl;
	inet->uc_index = old->uc_index;
	inet->tos = old->tos;
	inet->min_ttl = old->min_ttl;
	inet->pmtudisc = old->pmtudisc;
	inet->local_port_range = old->local_port_range;
#if IS_ENABLED(CONFIG_IPV6)
	if (from->sk_family == AF_INET6) {
		struct ipv6_pinfo *np = inet6_sk(to);
		const struct ipv6_pinfo *old6 = inet6_sk(from);

		np->hop_limit = old6->hop_limit;
		np->pmtudisc = old6->pmtudisc;
		np->tclass = old6->tclass;
		np->frag_size = old6->frag_size;
		np->ucast_oif = old6->ucast_oif;
		np->rxopt = old6->rxopt;
		np->srcprefs = old6->srcprefs;
		np->min_hopcount = old6->min_hopcount;
	}
#endif
}

static void mp_copy_tcp_options(struct sock *to, const struct sock *from)
{
	struct inet_connection_sock *icsk = inet_csk(to);
	const struct inet_connection_sock *old = inet_csk(from);
	struct tcp_sock *tp = tcp_sk(to);
	const struct tcp_sock *old_tp = tcp_sk(from);

	icsk->icsk_rto_min = old->icsk_rto_min;
	icsk->icsk_delack_max = old->icsk_delack_max;
	icsk->icsk_syn_retries = old->icsk_syn_retries;
	icsk->icsk_user_timeout = old->icsk_user_timeout;
	icsk->icsk_accept_queue.rskq_defer_accept = old->icsk_accept_queue.rskq_defer_accept;
	tp->nonagle = old_tp->nonagle;
	tp->thin_lto = old_tp->thin_lto;
	tp->save_syn = old_tp->save_syn;
	tp->recvmsg_inq = old_tp->recvmsg_inq;
	tp->linger2 = old_tp->linger2;
	tp->notsent_lowat = old_tp->notsent_lowat;
	tp->window_clamp = old_tp->window_clamp;
	tp->rx_opt.user_mss = old_tp->rx_opt.user_mss;
	tp->keepalive_time = old_tp->keepalive_time;
	tp->keepalive_intvl = old_tp->keepalive_intvl;
	tp->keepalive_probes = old_tp->keepalive_probes;
}

static void mp_copy_address(struct sock *to, const struct sock *from)
{
	inet_sk(to)->inet_num = inet_sk(from)->inet_num;
	inet_sk(to)->inet_saddr = inet_sk(from)->inet_saddr;
	to->sk_rcv_saddr = from->sk_rcv_saddr;
	to->sk_ipv6only = from->sk_ipv6only;
	to->sk_reuse = from->sk_reuse;
#if IS_ENABLED(CONFIG_IPV6)
	to->sk_v6_rcv_saddr = from->sk_v6_rcv_saddr;
	if (from->sk_family == AF_INET6)
		inet6_sk(to)->saddr = inet6_sk(from)->saddr;
#endif
	to->sk_userlocks |= SOCK_BINDADDR_LOCK | SOCK_BINDPORT_LOCK;
}

/* Copy everything into @to, which nobody else knows of yet; name its CC. */
static int mp_copy_all(struct sock *to, struct sock *from, char *congestion)
{
	int ret = 0;

	lock_sock(from);
	if (from->sk_state != TCP_LISTEN) {
		ret = -EINVAL;
	} else if (mp_listener_is_special(from)) {
		ret = -EOPNOTSUPP;
	} else {
		mp_copy_sock_options(to, from);
		mp_copy_inet_options(to, from);
		mp_copy_tcp_options(to, from);
		mp_copy_address(to, from);
		strscpy(congestion, inet_csk(from)->icsk_ca_ops->name, TCP_CA_NAME_MAX);
	}
	release_sock(from);
	return ret;
}

struct socket *mp_listener_copy(struct file *listener)
{
	struct sock *from = sock_from_file(listener)->sk;
	char congestion[TCP_CA_NAME_MAX] = "";
	struct socket *sock;
	int ret;

	/* The user's, as if made with socket(): asked for, charged, counted. */
	ret = __sock_create(sock_net(from), from->sk_family, SOCK_STREAM, IPPROTO_TCP, &sock, 0);
	if (ret)
		return ERR_PTR(ret);
	ret = mp_copy_all(sock->sk, from, congestion);
	if (!ret && strcmp(congestion, inet_csk(sock->sk)->icsk_ca_ops->name))
		ret = do_sock_setsockopt(sock, false, SOL_TCP, TCP_CONGESTION,
					 KERNEL_SOCKPTR(congestion), strlen(congestion));
	if (ret) {
		mp_listener_discard(sock);
		return ERR_PTR(ret);
	}
	return sock;
}

void mp_listener_discard(struct socket *copy)
{
	struct sock *sk = copy->sk;

	lock_sock(sk);
	/* The end of listening would have freed the mask; it never listened. */
	inet_csk_listen_on_cpus(sk, NULL);
	/* A port without a bind bucket would be taken for a mistake. */
	if (!inet_csk(sk)->icsk_bind_hash)
		inet_sk(sk)->inet_num = 0;
	release_sock(sk);
	sock_release(copy);
}
