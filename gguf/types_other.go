package gguf

import "math/bits"

// otherType is a type that files may hold although ggml 0.21.0 does not have it. This package cannot decode it. Where
// its geometry is known, the size of its tensors is known, so that they can be copied as they are.
type otherType struct {
	name   string
	origin string

	// A row of n elements has rowBytes and then n/blockElems blocks of blockBytes each. blockElems is 0 if the layout
	// is not known, or if numbers are used for two types.
	blockElems, blockBytes, rowBytes int
	// tensorBytes follow the last row.
	tensorBytes int
}

// size returns the bytes of a tensor that consists of rows rows of rowElems elements each. It is false if the size is
// not known, or exceeds 63 bits.
func (o otherType) size(rows, rowElems uint64) (n uint64, ok bool) {
	if o.blockElems == 0 || rowElems%uint64(o.blockElems) != 0 {
		return 0, false
	}
	if rows == 0 || rowElems == 0 {
		return 0, true
	}
	hi, row := bits.Mul64(rowElems/uint64(o.blockElems), uint64(o.blockBytes))
	row, carry := bits.Add64(row, uint64(o.rowBytes), 0)
	hi2, all := bits.Mul64(row, rows)
	all, carry2 := bits.Add64(all, uint64(o.tensorBytes), 0)
	return all, hi|carry|hi2|carry2 == 0 && all < 1<<63
}

const (
	retiredGGML = "ggml, which has retired it"
	bitnet      = "BitNet (bitnet.cpp), also in ik_llama.cpp"
	ik          = "ik_llama.cpp"
)

// otherTypes are the retired types of ggml, and those of forks whose files are in use. The numbers and geometries are
// facts of these programs: ggml.h and the table of type traits of ik_llama.cpp (commit 8337e4cd3, August 2026), and of
// microsoft/BitNet's llama.cpp. Its I2_S and TL1 store two bits for each element and then 32 bytes that begin with the
// tensor's scale. BitNet's TL2 has the number of ggml's MXFP4, and cannot be told from it.
//
// In rows that are "interleaved" (…_R4 and so on), the blocks of several rows alternate, which does not change the
// size.
var otherTypes = map[Type]otherType{
	4:  {name: "Q4_2", origin: retiredGGML},
	5:  {name: "Q4_3", origin: retiredGGML},
	31: {name: "Q4_0_4_4", origin: retiredGGML, blockElems: 32, blockBytes: 18},
	32: {name: "Q4_0_4_8", origin: retiredGGML, blockElems: 32, blockBytes: 18},
	33: {name: "Q4_0_8_8", origin: retiredGGML, blockElems: 32, blockBytes: 18},
	// Shortly the numbers of ggml's IQ4_NL_4_4, IQ4_NL_4_8 and IQ4_NL_8_8, which were meant for repacking in memory.
	36: {name: "I2_S", origin: bitnet, blockElems: 4, blockBytes: 1, tensorBytes: 32},
	37: {name: "IQ4_NL_4_8", origin: retiredGGML + "; BitNet uses the number for I8_S"},
	38: {name: "IQ4_NL_8_8", origin: retiredGGML + "; BitNet uses the number for TL1"},

	97:  {name: "Q8_0_X4", origin: ik, blockElems: 32, blockBytes: 34},
	98:  {name: "Q8_1_X4", origin: ik, blockElems: 32, blockBytes: 36},
	99:  {name: "Q8_2_X4", origin: ik, blockElems: 32, blockBytes: 36},
	133: {name: "Q6_0", origin: ik, blockElems: 32, blockBytes: 26},
	134: {name: "IQ1_BN", origin: ik, blockElems: 64, blockBytes: 13, rowBytes: 2},
	135: {name: "IQ2_BN", origin: ik, blockElems: 64, blockBytes: 16, rowBytes: 4},
	136: {name: "Q8_K64", origin: ik, blockElems: 64, blockBytes: 68},
	137: {name: "IQ2_K", origin: ik, blockElems: 256, blockBytes: 76},
	138: {name: "IQ3_K", origin: ik, blockElems: 256, blockBytes: 110},
	139: {name: "IQ4_K", origin: ik, blockElems: 256, blockBytes: 144},
	140: {name: "IQ5_K", origin: ik, blockElems: 256, blockBytes: 176},
	141: {name: "IQ6_K", origin: ik, blockElems: 256, blockBytes: 212},
	142: {name: "IQ2_TN", origin: ik + ", which has retired it"},
	143: {name: "IQ1_TN", origin: ik + ", which has retired it"},
	144: {name: "IQ4_KS", origin: ik, blockElems: 256, blockBytes: 136, rowBytes: 4},
	145: {name: "IQ2_KS", origin: ik, blockElems: 256, blockBytes: 70, rowBytes: 2},
	146: {name: "IQ4_KSS", origin: ik, blockElems: 256, blockBytes: 128, rowBytes: 4},
	147: {name: "Q8_K16", origin: ik, blockElems: 64, blockBytes: 64, rowBytes: 20},
	148: {name: "Q8_K32", origin: ik, blockElems: 256, blockBytes: 296},
	149: {name: "Q8_KR8", origin: ik, blockElems: 256, blockBytes: 296},
	150: {name: "Q8_K128", origin: ik, blockElems: 128, blockBytes: 140},
	151: {name: "Q8_KV", origin: ik, blockElems: 32, blockBytes: 32, rowBytes: 8},
	152: {name: "IQ5_KS", origin: ik, blockElems: 256, blockBytes: 168, rowBytes: 4},
	153: {name: "IQ2_KT", origin: ik, blockElems: 256, blockBytes: 68, rowBytes: 4},
	154: {name: "IQ3_KT", origin: ik, blockElems: 256, blockBytes: 100, rowBytes: 4},
	155: {name: "IQ4_KT", origin: ik, blockElems: 256, blockBytes: 128, rowBytes: 4},
	156: {name: "IQ3_KS", origin: ik, blockElems: 256, blockBytes: 102, rowBytes: 2},
	157: {name: "IQ2_KL", origin: ik, blockElems: 256, blockBytes: 86, rowBytes: 2},
	158: {name: "IQ1_KT", origin: ik, blockElems: 256, blockBytes: 56, rowBytes: 4},

	202: {name: "Q4_0_R8", origin: ik, blockElems: 32, blockBytes: 18},
	206: {name: "Q5_0_R4", origin: ik, blockElems: 32, blockBytes: 22},
	208: {name: "Q8_0_R8", origin: ik, blockElems: 32, blockBytes: 34},
	210: {name: "Q2_K_R4", origin: ik, blockElems: 256, blockBytes: 84},
	211: {name: "Q3_K_R4", origin: ik, blockElems: 256, blockBytes: 110},
	212: {name: "Q4_K_R4", origin: ik, blockElems: 256, blockBytes: 144},
	213: {name: "Q5_K_R4", origin: ik, blockElems: 256, blockBytes: 176},
	214: {name: "Q6_K_R4", origin: ik, blockElems: 256, blockBytes: 210},
	216: {name: "IQ2_XXS_R4", origin: ik, blockElems: 256, blockBytes: 66},
	217: {name: "IQ2_XS_R4", origin: ik, blockElems: 256, blockBytes: 74},
	218: {name: "IQ3_XXS_R4", origin: ik, blockElems: 256, blockBytes: 98},
	219: {name: "IQ1_S_R4", origin: ik, blockElems: 32, blockBytes: 6, rowBytes: 2},
	220: {name: "IQ4_NL_R4", origin: ik, blockElems: 32, blockBytes: 18},
	221: {name: "IQ3_S_R4", origin: ik, blockElems: 256, blockBytes: 110},
	222: {name: "IQ2_S_R4", origin: ik, blockElems: 256, blockBytes: 82},
	223: {name: "IQ4_XS_R8", origin: ik, blockElems: 256, blockBytes: 136},
	229: {name: "IQ1_M_R4", origin: ik, blockElems: 32, blockBytes: 7, rowBytes: 2},
	230: {name: "BF16_R16", origin: ik, blockElems: 1, blockBytes: 2},
	233: {name: "Q6_0_R4", origin: ik, blockElems: 32, blockBytes: 26},
	335: {name: "IQ2_BN_R4", origin: ik, blockElems: 64, blockBytes: 16, rowBytes: 4},
	337: {name: "IQ2_K_R4", origin: ik, blockElems: 256, blockBytes: 76},
	338: {name: "IQ3_K_R4", origin: ik, blockElems: 256, blockBytes: 110},
	339: {name: "IQ4_K_R4", origin: ik, blockElems: 256, blockBytes: 144},
	340: {name: "IQ5_K_R4", origin: ik, blockElems: 256, blockBytes: 176},
	344: {name: "IQ4_KS_R4", origin: ik, blockElems: 256, blockBytes: 136, rowBytes: 4},
	352: {name: "IQ5_KS_R4", origin: ik, blockElems: 256, blockBytes: 168, rowBytes: 4},
	353: {name: "MXFP4_R8", origin: ik, blockElems: 32, blockBytes: 17},
	397: {name: "Q8_K_R16", origin: ik, blockElems: 256, blockBytes: 258},
	398: {name: "Q8_KV_R8", origin: ik, blockElems: 32, blockBytes: 32, rowBytes: 4},
	399: {name: "Q8_K_R8", origin: ik, blockElems: 256, blockBytes: 258},
}
