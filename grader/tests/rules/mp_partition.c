// SPDX-License-Identifier: GPL-2.0-only
/* Partitioning, written another way. It compiles; no more. */
#include <linux/bitmap.h>
#include <linux/err.h>
#include <linux/hashtable.h>
#include <linux/idr.h>
#include <linux/kref.h>
#include <linux/mutex.h>
#include <linux/rwsem.h>
#include <linux/slab.h>
#include <linux/wait.h>
#include <net/inet_connection_sock.h>

#include "partition.h"

struct listener {
	struct hlist_node node;
	struct kref users;
	struct inode *inode;
	struct file *parts[NR_CPUS];
	cpumask_t taken;
	wait_queue_head_t gone;
};

static DEFINE_HASHTABLE(listeners, 6);
static DECLARE_RWSEM(sem);
static DEFINE_MUTEX(starting);
static DEFINE_IDA(numbers);

static struct listener *find(const struct file *file)
{
	struct listener *l;

	hash_for_each_possible(listeners, l, node, (unsigned long)file_inode(file))
		if (l->inode == file_inode(file))
			return l;
	return NULL;
}

static void release(struct kref *users)
{
	struct listener *l = container_of(users, struct listener, users);

	hash_del(&l->node);
	wake_up_all(&l->gone);
	kvfree(l);
}

static struct file *part_of(struct file *listener, const struct cpumask *cpus)
{
	struct socket *sock = mp_listener_copy(listener);
	int ret;

	if (IS_ERR(sock))
		return ERR_CAST(sock);
	scoped_guard(mutex, &starting) {
		lock_sock_nested(sock->sk, SINGLE_DEPTH_NESTING);
		sock->sk->sk_reuse = SK_FORCE_REUSE;
		ret = inet_csk_listen_on_cpus(sock->sk, cpus) ?: inet_csk_listen_start(sock->sk);
		release_sock(sock->sk);
	}
	if (!ret)
		return sock_alloc_file(sock, O_NONBLOCK, "part");
	mp_listener_discard(sock);
	return ERR_PTR(ret);
}

static struct file *partitioned_open(struct file *listener, const struct cpumask *cpus)
{
	struct file *file = ERR_PTR(-EBUSY);
	struct listener *l;
	int cpu, number;

	down_write(&sem);
	l = find(listener);
	if (l) {
		kref_get(&l->users);
	} else {
		l = kvzalloc(sizeof(*l), GFP_KERNEL_ACCOUNT);
		if (!l) {
			up_write(&sem);
			return ERR_PTR(-ENOMEM);
		}
		kref_init(&l->users);
		init_waitqueue_head(&l->gone);
		l->inode = file_inode(listener);
		hash_add(listeners, &l->node, (unsigned long)l->inode);
	}
	number = ida_alloc(&numbers, GFP_KERNEL);
	if (number >= 0 && !cpumask_intersects(&l->taken, cpus))
		file = part_of(listener, cpus);
	if (IS_ERR(file)) {
		kref_put(&l->users, release);
	} else {
		cpumask_or(&l->taken, &l->taken, cpus);
		for_each_cpu(cpu, cpus)
			l->parts[cpu] = file;
	}
	up_write(&sem);
	return file;
}

static void partitioned_close(struct file *listener, struct file *file)
{
	struct listener *l;
	int cpu;

	scoped_guard(rwsem_write, &sem) {
		l = find(listener);
		if (WARN_ON(!l))
			return;
		kernel_sock_shutdown(sock_from_file(file), SHUT_RDWR);
		for_each_possible_cpu(cpu) {
			if (l->parts[cpu] == file) {
				l->parts[cpu] = NULL;
				cpumask_clear_cpu(cpu, &l->taken);
			}
		}
		kref_put(&l->users, release);
	}
	fput(file);
	if (cpumask_weight(cpu_online_mask) > nr_cpu_ids)
		mp_shared_ops.close(listener, file);
}

const struct mp_partition_ops mp_partitioned_ops = { partitioned_open, partitioned_close };
