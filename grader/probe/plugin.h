/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the plugins have in common when QEMU loads them: their arguments, the file that they share
 * with the reader, and how they say that something is wrong with either. Before it is included,
 * PLUGIN_NAME is what their complaints begin with.
 */
#ifndef PLUGIN_H
#define PLUGIN_H

#include "qemu_plugin_api.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/*
 * A function begins with ENDBR64 and the room for a call of ftrace, which are never left, nor
 * jumped to, within the function. A block that begins behind them, or between, is one that was
 * entered past what is counted: it counts as well.
 */
#define PROLOGUE_BYTES	9

/* Complain, and return what makes QEMU give up. */
__attribute__((format(printf, 1, 2))) static inline int refuse(const char *format, ...)
{
	va_list args;

	fputs(PLUGIN_NAME ": ", stderr);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	return -1;
}

/* The value of "key=value", or NULL if it is another key. */
static inline const char *value_of(const char *argument, const char *key)
{
	size_t length = strlen(key);

	return !strncmp(argument, key, length) && argument[length] == '=' ?
		       argument + length + 1 :
		       NULL;
}

/* Map a shared file of at least @least bytes, and say how many it has; NULL: it was refused. */
static inline void *map_file(const char *path, size_t least, uint64_t *bytes)
{
	struct stat status;
	void *map;
	int fd;

	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0) {
		refuse("%s: %s", path, strerror(errno));
		return NULL;
	}
	if (fstat(fd, &status) || status.st_size < (off_t)least) {
		close(fd);
		refuse("%s: shorter than its header", path);
		return NULL;
	}
	*bytes = (uint64_t)status.st_size;
	map = mmap(NULL, *bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (map == MAP_FAILED) {
		refuse("%s: mmap: %s", path, strerror(errno));
		return NULL;
	}
	return map;
}

/* From this version on qemu_plugin_insn_data() copies. */
#define API_DATA_COPIED	3
#define INSN_BYTES	16

/*
 * The instruction's bytes and their number, valid while it is translated; @copy of INSN_BYTES is
 * where they may be put.
 */
static inline const unsigned char *insn_bytes(const struct qemu_plugin_insn *insn,
					      uint32_t api_version, unsigned char *copy,
					      size_t *size)
{
	*size = qemu_plugin_insn_size(insn);
	if (api_version < API_DATA_COPIED)
		return ((qemu_plugin_insn_data_v1_t)qemu_plugin_insn_data)(insn);
	if (*size > INSN_BYTES)
		*size = INSN_BYTES;
	*size = ((qemu_plugin_insn_data_v3_t)qemu_plugin_insn_data)(insn, copy, *size);
	return copy;
}

#endif
