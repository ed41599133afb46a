// SPDX-License-Identifier: GPL-2.0-only
/*
 * Lab 2: each core accepts from a queue of its own.
 *
 * You write the two functions below; kernel/megapipe/partition.h says when each
 * is called and what you may call, kernel/megapipe/partition_plain.c is the
 * plain way that you replace. The module calls your functions for channels that
 * were created with MP_PARTITION, and the plain ones for all others.
 *
 * A part is a second listening socket at the same address, with a mask of CPUs.
 * The kernel gives a handshake to the socket whose mask holds the CPU on which
 * it arrived, and to the original if there is none. What the kernel does not
 * know is which parts belong together, and that no CPU may be in two of them.
 */
#include <linux/file.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/net.h>
#include <linux/slab.h>
#include <net/inet_connection_sock.h>

#include "partition.h"

/* BEGIN SOLUTION */
struct part {
	struct list_head link;
	struct file *listener;	/* what it is a part of; the handle holds it */
	struct file *file;	/* its own socket's */
	cpumask_var_t cpus;
};

/*
 * All parts of all listeners, whichever channel has them. @parts_lock guards the
 * list, and is held from the question whether the CPUs are free until they are
 * taken, and while they are given back.
 */
static LIST_HEAD(parts);
static DEFINE_MUTEX(parts_lock);

static void free_part(struct part *p)
{
	free_cpumask_var(p->cpus);
	kfree(p);
}

/* Let the copy listen, at an address that is in use, for these CPUs only. */
static int start_listening(struct sock *sk, const struct cpumask *cpus)
{
	u8 reuse = sk->sk_reuse;
	int ret;

	lock_sock(sk);
	/* Before anything can be given to it. */
	ret = inet_csk_listen_on_cpus(sk, cpus);
	if (!ret) {
		/* The address is in use, and that is the point. */
		sk->sk_reuse = SK_FORCE_REUSE;
		ret = inet_csk_listen_start(sk);
		sk->sk_reuse = reuse;
	}
	release_sock(sk);
	return ret;
}

static struct file *listen_for(struct file *listener, const struct cpumask *cpus)
{
	struct socket *sock = mp_listener_copy(listener);
	int ret;

	if (IS_ERR(sock))
		return ERR_CAST(sock);
	ret = start_listening(sock->sk, cpus);
	if (ret) {
		mp_listener_discard(sock);
		return ERR_PTR(ret);
	}
	/* Releases the socket if it fails. */
	return sock_alloc_file(sock, O_NONBLOCK, NULL);
}

static void stop_listening(struct file *file)
{
	struct socket *sock = sock_from_file(file);

	sock->ops->shutdown(sock, SHUT_RDWR);
}

static bool cpus_taken(struct file *listener, const struct cpumask *cpus)
{
	struct part *p;

	list_for_each_entry(p, &parts, link)
		/* A socket has one file, however many descriptors. */
		if (p->listener == listener && cpumask_intersects(p->cpus, cpus))
			return true;
	return false;
}

/* END SOLUTION */
/* STUDENT: make a listening socket for these CPUs; no CPU is in two parts of one listener. */
static struct file *partitioned_open(struct file *listener, const struct cpumask *cpus)
{
	/* BEGIN SOLUTION */
	struct file *file;
	struct part *p;

	p = kzalloc(sizeof(*p), GFP_KERNEL_ACCOUNT);
	if (!p)
		return ERR_PTR(-ENOMEM);
	if (!alloc_cpumask_var(&p->cpus, GFP_KERNEL_ACCOUNT)) {
		kfree(p);
		return ERR_PTR(-ENOMEM);
	}
	p->listener = listener;
	cpumask_copy(p->cpus, cpus);

	mutex_lock(&parts_lock);
	if (cpus_taken(listener, cpus))
		file = ERR_PTR(-EBUSY);
	else
		file = listen_for(listener, cpus);
	if (!IS_ERR(file)) {
		p->file = file;
		list_add(&p->link, &parts);
	}
	mutex_unlock(&parts_lock);

	if (IS_ERR(file))
		free_part(p);
	return file;
	/* ELSE STARTER */
	//| return mp_shared_ops.open(listener, cpus);
	/* END SOLUTION */
}

/* STUDENT: give the CPUs back: from now on their handshakes are the original's again. */
static void partitioned_close(struct file *listener, struct file *file)
{
	/* BEGIN SOLUTION */
	struct part *p;

	mutex_lock(&parts_lock);
	list_for_each_entry(p, &parts, link) {
		if (p->file == file) {
			list_del(&p->link);
			break;
		}
	}
	/* Only when it has stopped may somebody else have its CPUs. */
	stop_listening(file);
	mutex_unlock(&parts_lock);
	free_part(p);
	fput(file);
	/* ELSE STARTER */
	//| mp_shared_ops.close(listener, file);
	/* END SOLUTION */
}

const struct mp_partition_ops mp_partitioned_ops = {
	.open	= partitioned_open,
	.close	= partitioned_close,
};
