/* SPDX-License-Identifier: GPL-2.0 */
/* DMA engines that copy folios, and their channels: mm/migrate_copy_dma.c */
#ifndef _MM_MIGRATE_COPY_DMA_H
#define _MM_MIGRATE_COPY_DMA_H

#include <linux/types.h>

struct dma_chan;

#define COPY_CHANNELS	16

#define CHANNEL_TAKEN	0
#define CHANNEL_SICK	1

struct copy_channel {
	struct dma_chan *chan;		/* NULL if there is none */
	int node;
	unsigned long flags;
};

unsigned int copy_channels_take(struct copy_channel **taken, unsigned int want, int nid,
				bool same_device);
void copy_channels_return(struct copy_channel **taken, unsigned int nr);
bool copy_channels_exist(void);
void copy_channel_is_sick(struct copy_channel *channel);
int copy_channels_open(void);
void copy_channels_close(void);

/* Ends what @channel has not, if its driver can be believed to have stopped it. */
bool copy_channel_stop(struct copy_channel *channel);
/* Its driver goes, and it has not been stopped: its parts never end. */
void copy_channel_is_lost(struct copy_channel *channel);

#endif /* _MM_MIGRATE_COPY_DMA_H */
