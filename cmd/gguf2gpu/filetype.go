package main

import "fmt"

// guessedFileType is added to general.file_type by programs that have guessed it (llama.h, LLAMA_FTYPE_GUESSED).
const guessedFileType = 1024

// fileTypes are the names of the values of general.file_type, without "mostly": what a quantization is called in the
// names of files. The numbers are those of enum llama_ftype of llama.cpp's llama.h; those above 128 are ik_llama.cpp's.
var fileTypes = map[uint64]string{
	0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "Q4_1, some F16", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1",
	10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
	19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S",
	27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
	33: "Q4_0_4_4", 34: "Q4_0_4_8", 35: "Q4_0_8_8", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0",

	135: "Q6_0", 136: "IQ1_BN", 137: "IQ2_BN", 138: "IQ2_K", 139: "IQ3_K", 140: "IQ4_K", 141: "IQ5_K", 142: "IQ6_K",
	145: "IQ4_KS", 146: "IQ3_KL", 147: "IQ2_KS", 148: "IQ4_KSS", 149: "Q8_KV", 150: "IQ5_KS", 151: "IQ2_KT", 152: "IQ3_KT",
	153: "IQ4_KT", 154: "IQ3_KS", 155: "IQ2_KL", 156: "IQ1_KT",
}

// fileTypeName returns what a value of general.file_type is called.
func fileTypeName(n uint64) string {
	if name, ok := fileTypes[n&^guessedFileType]; ok {
		if n&guessedFileType != 0 {
			return name + " (guessed)"
		}
		return name
	}
	return fmt.Sprintf("file type %d", n)
}
