// Package doctor finds out what a machine offers to gguf2gpu: which HIP library there is, which GPUs it sees, what
// the kernel driver and the file system say of them, and what limits apply to the process. [Check] returns all of it
// as values, with advice where no GPU is usable and warnings of what may make loads slow or wrong.
//
// It changes nothing. Whatever it cannot find out counts as absent.
package doctor
