// SPDX-License-Identifier: GPL-2.0-only
/*
 * MegaPipe: the device, channels and the crossing.
 */
#include <linux/anon_inodes.h>
#include <linux/cred.h>
#include <linux/file.h>
#include <linux/hrtimer.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/nospec.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/wait_bit.h>

#include "batch.h"
#include "lwsocket.h"
#include "partition.h"

/* --- executing a request ------------------------------------------------------ */

static int mp_unregister(struct mp_handle *h, const struct mp_request *req)
{
	struct mp_channel *ch = h->channel;
	u64 cookie = h->cookie;

	mp_handle_remove(h);
	mp_post(ch, (struct mp_completion){
		.op = MP_OP_UNREGISTER,
		.handle = req->handle,
		.cookie = cookie,
	});
	return 0;
}

/*
 * One row per operation. @run or @on_channel returns 0 if the operation has
 * completed or is pending, or the negative errno with which it completes.
 */
struct mp_operation {
	int (*run)(struct mp_handle *h, const struct mp_request *req);
	int (*on_channel)(struct mp_channel *ch, const struct mp_request *req);
	/* What a request of this operation may have beside its handle. */
	bool takes_addr;
	bool takes_len;
	u8 flags;
};

static const struct mp_operation mp_operations[MP_NR_OPS] = {
	[MP_OP_REGISTER]	= { .on_channel = mp_register },
	[MP_OP_UNREGISTER]	= { mp_unregister },
	[MP_OP_ACCEPT]		= { mp_accept, .takes_len = true, .flags = MP_ACCEPT_LWSOCKET },
	[MP_OP_READ]		= { mp_read, NULL, true, true, MP_AT_OFFSET },
	[MP_OP_WRITE]		= { mp_write, NULL, true, true, MP_AT_OFFSET },
	[MP_OP_WRITEV]		= { mp_write, NULL, true, true, MP_AT_OFFSET },
	[MP_OP_DISCONNECT]	= { mp_disconnect },
	[MP_OP_CONVERT]		= { mp_convert },
	[MP_OP_DROP]		= { .on_channel = mp_drop },
};

/* Has the request something that its operation does not take? */
static bool mp_has_too_much(const struct mp_operation *operation, const struct mp_request *req)
{
	return req->fd || req->flags & ~operation->flags ||
	       (req->cookie && !(req->flags & MP_AT_OFFSET)) ||
	       (req->addr && !operation->takes_addr) || (req->len && !operation->takes_len);
}

static int mp_try_execute(struct mp_channel *ch, const struct mp_request *req)
{
	const struct mp_operation *operation;
	struct mp_handle *h;

	if (req->op >= MP_NR_OPS || req->reserved)
		return -EINVAL;
	operation = &mp_operations[array_index_nospec(req->op, MP_NR_OPS)];
	if (operation->on_channel)
		return operation->on_channel(ch, req);
	if (mp_has_too_much(operation, req))
		return -EINVAL;
	h = mp_handle_find(ch, req->handle);
	return h ? operation->run(h, req) : -ENOENT;
}

/* The cookie that goes with a failed request: its handle's, or the one that it brought. */
static u64 mp_cookie_of(struct mp_channel *ch, const struct mp_request *req)
{
	struct mp_handle *h;

	if (req->op == MP_OP_REGISTER)
		return req->cookie;
	h = req->op == MP_OP_DROP ? NULL : mp_handle_find(ch, req->handle);
	if (h)
		return h->cookie;
	/* Not an offset, which has the same place. */
	return req->flags & MP_AT_OFFSET ? 0 : req->cookie;
}

static void mp_fail(struct mp_channel *ch, const struct mp_request *req, int error)
{
	mp_post(ch, (struct mp_completion){
		.op = req->op,
		.handle = req->handle,
		.result = error,
		.cookie = mp_cookie_of(ch, req),
	});
}

void mp_execute_any(struct mp_channel *ch, const struct mp_request *req)
{
	int ret = mp_try_execute(ch, req);

	if (ret < 0)
		mp_fail(ch, req, ret);
}

/* --- crossing ----------------------------------------------------------------- */

void mp_wake_owner(struct mp_channel *ch)
{
	wake_up_process(ch->owner);
}

bool mp_schedule(ktime_t *deadline)
{
	return schedule_hrtimeout_range(deadline, current->timer_slack_ns, HRTIMER_MODE_ABS);
}

/* Softirqs, which executing and running may have left off, are on afterwards. */
static u32 mp_drain(struct mp_channel *ch)
{
	u32 taken = ch->batch->drain(ch);

	mp_quiet_end(ch);
	return taken;
}

static u32 mp_complete_ready(struct mp_channel *ch)
{
	u32 filled = ch->batch->complete(ch);

	mp_quiet_end(ch);
	return filled;
}

/*
 * A handle may be ready and its operation still not go through: a write finds
 * room in the send queue but no memory for a buffer, as long as TCP is short of
 * it. After so many rounds in a row that led to nothing, wait a tick for each.
 */
#define MP_FRUITLESS_ROUNDS	16

/* Returns 0 when there is a completion or the time is over, or -EINTR. */
static int mp_wait(struct mp_channel *ch)
{
	unsigned int fruitless = 0;
	s64 timeout = READ_ONCE(ch->shared->timeout_ns);
	ktime_t deadline = KTIME_MAX;
	bool expired = !timeout;
	int ret;

	if (timeout > 0)
		deadline = ktime_add_safe(ktime_get(), ns_to_ktime(timeout));

	while (!mp_complete_ready(ch) && !expired) {
		if (signal_pending(current))
			return -EINTR;
		ret = ch->batch->sleep(ch, timeout < 0 ? NULL : &deadline);
		if (ret == -EAGAIN) {
			if (++fruitless > MP_FRUITLESS_ROUNDS)
				schedule_timeout_interruptible(1);
			if (timeout > 0)
				expired = ktime_after(ktime_get(), deadline);
		} else {
			expired = ret == -ETIME;
			fruitless = 0;
		}
		cond_resched();
	}
	return 0;
}

static long mp_channel_ioctl(struct file *file, unsigned int cmd, unsigned long flags)
{
	struct mp_channel *ch = file->private_data;
	u32 taken = 0;
	int ret;

	if (cmd != MP_IOC_ENTER)
		return -ENOTTY;
	if (current != ch->owner || current->mm != ch->mm)
		return -EPERM;
	if (flags & ~(unsigned long)(MP_ENTER_SUBMIT | MP_ENTER_WAIT))
		return -EINVAL;
	ret = mp_ring_check(ch);
	if (ret)
		return ret;
	if (flags & MP_ENTER_SUBMIT)
		taken = mp_drain(ch);
	if (flags & MP_ENTER_WAIT)
		ret = mp_wait(ch);
	/* What has been taken is taken, and the ring's sq_head tells. */
	return ret ? ret : taken;
}

/* --- making and ending channels ----------------------------------------------- */

static void mp_channel_free(struct mp_channel *ch)
{
	mp_handle_remove_all(ch);
	mp_lw_drop_all(ch);
	/* Buffers of reads and writes that are still under way are the user's again now. */
	wait_var_event(&ch->nr_jobs, !atomic_read(&ch->nr_jobs));
	mp_ring_destroy(ch);
	put_task_struct(ch->owner);
	mmdrop(ch->mm);
	kfree(ch);
}

static int mp_channel_release(struct inode *inode, struct file *file)
{
	mp_channel_free(file->private_data);
	return 0;
}

static int mp_channel_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct mp_channel *ch = file->private_data;

	if (current->mm != ch->mm)
		return -EPERM;
	return mp_ring_mmap(ch, vma);
}

static const struct file_operations mp_channel_fops = {
	.owner		= THIS_MODULE,
	.release	= mp_channel_release,
	.mmap		= mp_channel_mmap,
	.unlocked_ioctl	= mp_channel_ioctl,
	.llseek		= noop_llseek,
	.fop_flags	= FOP_DONTFORK,
};

static struct mp_channel *mp_channel_alloc(struct mp_create *args)
{
	struct mp_channel *ch;
	int ret;

	if (args->flags & ~(MP_BATCH | MP_PARTITION | MP_LWSOCKET) || args->reserved)
		return ERR_PTR(-EINVAL);
	ch = kzalloc(sizeof(*ch), GFP_KERNEL_ACCOUNT);
	if (!ch)
		return ERR_PTR(-ENOMEM);
	spin_lock_init(&ch->lock);
	INIT_LIST_HEAD(&ch->ready);
	ch->lw_free = MP_NO_SLOT;
	ch->batch = args->flags & MP_BATCH ? &mp_batched_ops : &mp_plain_ops;
	ch->partition = args->flags & MP_PARTITION ? &mp_partitioned_ops : &mp_shared_ops;
	ch->lwsocket = args->flags & MP_LWSOCKET ? &mp_lightweight_ops : NULL;
	ch->owner = get_task_struct(current);
	ch->mm = current->mm;
	mmgrab(ch->mm);

	ret = mp_ring_create(ch, args);
	if (ret) {
		mp_channel_free(ch);
		return ERR_PTR(ret);
	}
	return ch;
}

static long mp_device_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct mp_create __user *user = (void __user *)arg;
	struct mp_channel *ch;
	struct mp_create args;
	struct file *channel;
	int fd;

	if (cmd != MP_IOC_CREATE)
		return -ENOTTY;
	if (copy_from_user(&args, user, sizeof(args)))
		return -EFAULT;
	ch = mp_channel_alloc(&args);
	if (IS_ERR(ch))
		return PTR_ERR(ch);
	channel = anon_inode_getfile("[megapipe]", &mp_channel_fops, ch, O_RDWR);
	if (IS_ERR(channel)) {
		mp_channel_free(ch);
		return PTR_ERR(channel);
	}
	if (copy_to_user(user, &args, sizeof(args))) {
		fput(channel);
		return -EFAULT;
	}
	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0)
		fput(channel);
	else
		fd_install(fd, channel);
	return fd;
}

static const struct file_operations mp_device_fops = {
	.owner		= THIS_MODULE,
	.unlocked_ioctl	= mp_device_ioctl,
	.llseek		= noop_llseek,
};

static struct miscdevice mp_device = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= "megapipe",
	.fops	= &mp_device_fops,
	.mode	= 0666,
};

static int __init mp_init(void)
{
	int ret = mp_handle_init();

	if (ret)
		return ret;
	ret = mp_job_init();
	if (ret)
		goto err_handle;
	ret = mp_lightweight_ops.init();
	if (ret)
		goto err_job;
	ret = misc_register(&mp_device);
	if (ret)
		goto err_lwsocket;
	return 0;

err_lwsocket:
	mp_lightweight_ops.exit();
err_job:
	mp_job_exit();
err_handle:
	mp_handle_exit();
	return ret;
}

static void __exit mp_exit(void)
{
	misc_deregister(&mp_device);
	mp_lightweight_ops.exit();
	mp_job_exit();
	mp_handle_exit();
}

module_init(mp_init);
module_exit(mp_exit);
MODULE_DESCRIPTION("MegaPipe: batched, per-core network I/O (Han et al., OSDI 2012)");
MODULE_AUTHOR("The MegaPipe lab");
MODULE_LICENSE("GPL");
