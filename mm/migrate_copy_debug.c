// SPDX-License-Identifier: GPL-2.0
/*
 * Check copies that were made ahead.
 */
#include <linux/bug.h>
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/string.h>

#include "migrate_copy.h"

/*
 * @dst has taken the place of @src, which nobody else refers to any more: neither
 * can have changed since the copy was made, unless someone wrote who had no right
 * to, or the copy was not made of all.
 */
void copy_check(struct folio *dst, struct folio *src)
{
	unsigned long i;

	for (i = 0; i < folio_nr_pages(src); i++) {
		void *from = kmap_local_folio(src, i * PAGE_SIZE);
		void *to = kmap_local_folio(dst, i * PAGE_SIZE);
		const bool same = !memcmp(to, from, PAGE_SIZE);

		kunmap_local(to);
		kunmap_local(from);
		if (WARN_ONCE(!same, "page %lu of %lu is no copy\n", i,
			      folio_nr_pages(src)))
			return;
	}
}
