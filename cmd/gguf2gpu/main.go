// Command gguf2gpu puts the weights of a GGUF model into AMD GPU memory, and looks at models and devices.
// 'gguf2gpu help' lists its commands.
package main

import "os"

func main() { os.Exit(int(run(os.Args[1:]))) }
