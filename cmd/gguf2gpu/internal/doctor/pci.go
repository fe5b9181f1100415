package doctor

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

// Link is the PCI Express link between a GPU and the host, as it is now and at the card's best.
type Link struct {
	GPU      string  `json:"gpu"`       // PCI address
	Port     string  `json:"port"`      // PCI address of the card's side of the link
	Lanes    int     `json:"lanes"`     // in use
	MaxLanes int     `json:"max_lanes"` // of the card
	GTps     float64 `json:"gtps"`      // 10^9 transfers per second and lane
	MaxGTps  float64 `json:"max_gtps"`  // of the card
	GBps     float64 `json:"gbps"`      // what the link carries now in one direction, in 10^9 bytes per second
	MaxGBps  float64 `json:"max_gbps"`  // what it would carry at the card's best
}

const amdVendor = "0x1002" // of GPUs and of the switches on their cards; AMD's other devices have another number

// pciLinks finds the links of AMD's GPUs in sysfs. A GPU without a link there, such as a virtual function, is left
// out.
func (p probe) pciLinks() []Link {
	links := []Link{}
	for _, path := range p.glob("/sys/bus/pci/devices/*") {
		// The first byte of a class is 03 for a display controller and 12 for an accelerator without a display.
		class := p.read(filepath.Join(path, "class"))
		display := strings.HasPrefix(class, "0x03") || strings.HasPrefix(class, "0x12")
		if !display || p.read(filepath.Join(path, "vendor")) != amdVendor {
			continue
		}
		device, err := filepath.EvalSymlinks(p.path(path)) // its path in the tree of buses
		if err != nil {
			continue
		}
		// Most cards have a switch between the slot and the GPU. The GPU's own link then lies inside the card and is
		// always wide and fast. What counts is the link of the outermost port of the card.
		port := device
		for up := filepath.Dir(device); readLine(filepath.Join(up, "vendor")) == amdVendor; up = filepath.Dir(up) {
			port = up
		}
		link := Link{
			GPU: filepath.Base(path), Port: filepath.Base(port),
			Lanes: linkLanes(port, "current_link_width"), MaxLanes: linkLanes(port, "max_link_width"),
			GTps: linkSpeed(port, "current_link_speed"), MaxGTps: linkSpeed(port, "max_link_speed"),
		}
		if link.Lanes == 0 || link.MaxLanes == 0 || link.GTps == 0 || link.MaxGTps == 0 {
			continue
		}
		link.GBps, link.MaxGBps = linkRate(link.Lanes, link.GTps), linkRate(link.MaxLanes, link.MaxGTps)
		links = append(links, link)
	}
	return links
}

// linkLanes reads a number of lanes. It returns 0 if the file has none.
func linkLanes(port, name string) int {
	n, _ := strconv.ParseUint(readLine(filepath.Join(port, name)), 10, 8)
	return int(n)
}

// linkSpeed reads a speed such as "16.0 GT/s PCIe". It returns 0 if the file has none.
func linkSpeed(port, name string) float64 {
	number, _, _ := strings.Cut(readLine(filepath.Join(port, name)), " ")
	speed, _ := strconv.ParseFloat(number, 64)
	return speed
}

// linkRate returns what a link carries in one direction, in 10^9 bytes per second. Of ten bits eight are data up to 5
// GT/s (PCI Express 1 and 2), and 128 of 130 above (3 to 5).
func linkRate(lanes int, gtps float64) float64 {
	data := 128.0 / 130
	if gtps <= 5 {
		data = 0.8
	}
	return float64(lanes) * gtps * data / 8
}

// warn returns what is below the card's best, and what to do.
func (l Link) warn() []string {
	var warnings []string
	if l.Lanes < l.MaxLanes {
		warnings = append(warnings, fmt.Sprintf("GPU %s uses %d of its %d lanes: put it into a slot with %d lanes, seat it anew, "+
			"and look for lanes shared with other slots in the firmware setup", l.GPU, l.Lanes, l.MaxLanes, l.MaxLanes))
	}
	if l.GTps < l.MaxGTps {
		warnings = append(warnings, fmt.Sprintf("the link of GPU %s runs at %g of %g GT/s: an idle GPU saves power that way, so look "+
			"again during a load; if it stays, the slot, a riser cable or the firmware setup holds it back", l.GPU, l.GTps, l.MaxGTps))
	}
	return warnings
}
