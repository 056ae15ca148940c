/* A file system that is some way off: one folder, read only, each request answered after a delay.

   What network and parallel file systems cost is mostly the time that a request is under way; how
   many are under way at once decides how long a cold load takes. The kernel sends what a process
   reads in requests of at most the read-ahead window (128 KiB) or, for large reads, of max_read.

       gcc -O2 slowfs.c $(pkg-config --cflags --libs fuse3) -o slowfs
       ./slowfs FOLDER MOUNT MILLISECONDS

   It runs until it is unmounted (fusermount3 -u MOUNT). The file ".requests" of the mounted folder
   says how many requests there were, and how many bytes they asked for. */

#define FUSE_USE_VERSION 31
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int folder;
static long microseconds;
static atomic_long requests, bytes;
static const char counts[] = "/.requests";

static int told(char *text, size_t room) {
    return snprintf(text, room, "%ld %ld\n", atomic_load(&requests), atomic_load(&bytes));
}

static const char *inside(const char *path) { return path[1] ? path + 1 : "."; }

static int get_attributes(const char *path, struct stat *found, struct fuse_file_info *file) {
    (void)file;
    if (!strcmp(path, counts)) {
        char text[64];
        memset(found, 0, sizeof *found);
        found->st_mode = S_IFREG | 0444;
        found->st_nlink = 1;
        found->st_size = told(text, sizeof text);
        return 0;
    }
    return fstatat(folder, inside(path), found, 0) ? -errno : 0;
}

static int list(const char *path, void *names, fuse_fill_dir_t fill, off_t offset,
                struct fuse_file_info *file, enum fuse_readdir_flags flags) {
    (void)offset, (void)file, (void)flags;
    int opened = openat(folder, inside(path), O_RDONLY | O_DIRECTORY);
    DIR *entries = opened < 0 ? NULL : fdopendir(opened);
    if (!entries) return -errno;
    for (struct dirent *entry; (entry = readdir(entries));) fill(names, entry->d_name, NULL, 0, 0);
    closedir(entries);
    return 0;
}

static int open_file(const char *path, struct fuse_file_info *file) {
    if (!strcmp(path, counts)) {
        file->fh = (uint64_t)-1;
        file->direct_io = 1;
        return 0;
    }
    int opened = openat(folder, inside(path), O_RDONLY);
    if (opened < 0) return -errno;
    file->fh = (uint64_t)opened;
    file->keep_cache = 1; /* what was read stays in the page cache, as on any disk */
    return 0;
}

static int read_file(const char *path, char *out, size_t length, off_t start,
                     struct fuse_file_info *file) {
    (void)path;
    if (file->fh == (uint64_t)-1) {
        char text[64];
        int size = told(text, sizeof text);
        if (start >= size) return 0;
        if (length > (size_t)(size - start)) length = (size_t)(size - start);
        memcpy(out, text + start, length);
        return (int)length;
    }
    atomic_fetch_add(&requests, 1);
    atomic_fetch_add(&bytes, (long)length);
    struct timespec delay = {microseconds / 1000000, microseconds % 1000000 * 1000};
    nanosleep(&delay, NULL);
    ssize_t got = pread((int)file->fh, out, length, start);
    return got < 0 ? -errno : (int)got;
}

static int close_file(const char *path, struct fuse_file_info *file) {
    (void)path;
    if (file->fh != (uint64_t)-1) close((int)file->fh);
    return 0;
}

static const struct fuse_operations operations = {
    .getattr = get_attributes,
    .readdir = list,
    .open = open_file,
    .read = read_file,
    .release = close_file,
};

int main(int count, char **words) {
    if (count != 4) {
        fprintf(stderr, "usage: slowfs FOLDER MOUNT MILLISECONDS\n");
        return 2;
    }
    folder = open(words[1], O_RDONLY | O_DIRECTORY);
    if (folder < 0) return perror(words[1]), 1;
    microseconds = (long)(1000 * atof(words[3]));
    char *arguments[] = {words[0], "-o", "ro,fsname=slowfs,subtype=slowfs", words[2], NULL};
    return fuse_main(4, arguments, &operations, NULL);
}
