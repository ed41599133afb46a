// SPDX-License-Identifier: GPL-2.0-only
/*
 * MegaPipe: the two rings that user space and the kernel share.
 *
 * User space may write anything anywhere in the mapping at any time. The
 * kernel therefore keeps its own indices, reads the user's two indices once
 * per crossing (mp_ring_check()), copies a request before it looks at it, and
 * never reads a completion back.
 */
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/vmalloc.h>

#include "batch.h"

static u64 mp_sq_offset(void)
{
	return sizeof(struct mp_shared);
}

static u64 mp_cq_offset(u32 sq_entries)
{
	return mp_sq_offset() + (u64)sq_entries * sizeof(struct mp_request);
}

int mp_ring_create(struct mp_channel *ch, struct mp_create *args)
{
	u64 bytes;
	u32 i;

	BUILD_BUG_ON(sizeof(struct mp_shared) != 128);
	BUILD_BUG_ON(sizeof(struct mp_request) != 32);
	BUILD_BUG_ON(sizeof(struct mp_completion) != 32);

	if (!is_power_of_2(args->sq_entries) || args->sq_entries > MP_MAX_ENTRIES ||
	    !is_power_of_2(args->cq_entries) || args->cq_entries > MP_MAX_ENTRIES)
		return -EINVAL;

	bytes = PAGE_ALIGN(mp_cq_offset(args->sq_entries) +
			   (u64)args->cq_entries * sizeof(struct mp_completion));
	ch->pages = kvcalloc(bytes >> PAGE_SHIFT, sizeof(*ch->pages), GFP_KERNEL_ACCOUNT);
	if (!ch->pages)
		return -ENOMEM;
	for (i = 0; i < bytes >> PAGE_SHIFT; i++) {
		ch->pages[i] = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO);
		if (!ch->pages[i])
			return -ENOMEM;
		ch->nr_pages++;
	}
	ch->shared = vmap(ch->pages, ch->nr_pages, VM_MAP, PAGE_KERNEL);
	if (!ch->shared)
		return -ENOMEM;

	ch->sq_entries = args->sq_entries;
	ch->cq_entries = args->cq_entries;
	ch->sq = (void *)ch->shared + mp_sq_offset();
	ch->cq = (void *)ch->shared + mp_cq_offset(args->sq_entries);
	args->bytes = bytes;
	args->sq_offset = mp_sq_offset();
	args->cq_offset = mp_cq_offset(args->sq_entries);
	return 0;
}

/* Also undoes a mp_ring_create() that failed half-way. */
void mp_ring_destroy(struct mp_channel *ch)
{
	vunmap(ch->shared);
	while (ch->nr_pages)
		__free_page(ch->pages[--ch->nr_pages]);
	kvfree(ch->pages);
}

int mp_ring_mmap(struct mp_channel *ch, struct vm_area_struct *vma)
{
	if (!(vma->vm_flags & VM_SHARED) || vma->vm_pgoff ||
	    vma_pages(vma) != ch->nr_pages)
		return -EINVAL;
	/*
	 * Not into a child of fork(), not grown by mremap(), not into a core
	 * dump. VM_IO is what keeps madvise(MADV_DOFORK) from undoing the first.
	 */
	vm_flags_set(vma, VM_DONTCOPY | VM_DONTEXPAND | VM_DONTDUMP | VM_IO);
	return vm_map_pages(vma, ch->pages, ch->nr_pages);
}

/* Read the user's indices and check them. -EBADMSG if they cannot be. */
int mp_ring_check(struct mp_channel *ch)
{
	/*
	 * Acquire: the requests below sq_tail are read after it. Pairs with
	 * the release in libmegapipe.
	 */
	u32 sq_tail = smp_load_acquire(&ch->shared->sq_tail);
	/* Acquire: completions below cq_head have been read before they are overwritten. */
	u32 cq_head = smp_load_acquire(&ch->shared->cq_head);

	if (sq_tail - ch->sq_head > ch->sq_entries ||
	    ch->cq_tail - cq_head > ch->cq_entries)
		return -EBADMSG;
	ch->sq_tail = sq_tail;
	ch->cq_head = cq_head;
	return 0;
}

void mp_sq_advance(struct mp_channel *ch, u32 count)
{
	if (WARN_ON_ONCE(count > mp_sq_waiting(ch)))
		count = mp_sq_waiting(ch);
	ch->sq_head += count;
	/* Release: the copies were made before. Pairs with the user's acquire. */
	smp_store_release(&ch->shared->sq_head, ch->sq_head);
}

void mp_cq_publish(struct mp_channel *ch)
{
	/* Release: the completions were written before. Pairs with the user's acquire. */
	smp_store_release(&ch->shared->cq_tail, ch->cq_tail);
}
