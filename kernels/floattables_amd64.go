//go:build !purego

package kernels

import "sync"

// The assembly for IQ2_XXS, IQ2_XS and IQ3 reads the grids as floats, and signs as masks for the sign bits of eight
// floats, so that it has to convert nothing and to move nothing between the lanes of vectors. For IQ2_S and IQ1 it
// reads the grids as they are: as floats they would fill the L1 cache.
var (
	floatsIQ2XXS [256 * 8]float32
	floatsIQ2XS  [512 * 8]float32
	floatsIQ3XXS [256 * 4]float32
	floatsIQ3S   [512 * 4]float32
	signs7       [128][8]uint32 // indexed by seven sign bits; the eighth sign is their parity
	signs8       [256][8]uint32 // indexed by eight sign bits
)

// makeFloatTables fills these tables, some 50 KiB, once. It takes well below a millisecond.
var makeFloatTables = sync.OnceFunc(func() {
	for _, t := range []struct {
		floats []float32
		grid   string
	}{
		{floatsIQ2XXS[:], gridIQ2XXS},
		{floatsIQ2XS[:], gridIQ2XS},
		{floatsIQ3XXS[:], gridIQ3XXS},
		{floatsIQ3S[:], gridIQ3S},
	} {
		for i := range t.floats {
			t.floats[i] = float32(t.grid[i])
		}
	}
	for s := range signs8 {
		for j := range signs8[s] {
			signs8[s][j] = uint32(s>>j&1) << 31
		}
	}
	for i := range signs7 {
		signs7[i] = signs8[evenSigns(uint32(i))]
	}
})
