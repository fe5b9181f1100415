// Package read gets the bytes of a plan out of a model's file, or from a server, and hands them to whoever stages them.
//
// A [Source] is opened once for a load. Each worker has a [Reader] of its own, which reads one chunk after the other
// and gives every segment's bytes to the worker's [Sink]. Three transports bring the bytes:
//
//   - the file's read-only mapping, for pages that are in the page cache;
//   - direct reads past the page cache, for those that are not: what the device gets as it is in the file is read
//     straight to its place in staging memory, as far as direct reads can be aligned so, and all else into a scratch
//     buffer;
//   - ranges of a server, for models that are not files, and of files that cannot be mapped.
//
// Which of the first two is used is decided once for every window of 8 MiB, when the first worker comes to it. Windows
// of the mapping that everybody has read are let go, so that they do not count as this process's memory any more.
//
// Where direct reads do not work, at the first read or at any later one, ordinary reads are used, and the mapping where
// a file cannot be opened any more; see [Fallback]. A mode that is asked for fails instead.
package read
