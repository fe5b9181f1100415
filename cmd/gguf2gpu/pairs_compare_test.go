package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"lukechampine.com/blake3"
)

// reference is what the plain load of the whole model gives: from the file, by one thread, onto one software device.
type reference struct {
	report  loadReport
	tensors map[string]*contents
	sums    string // file with the hashes of the tensors in the file
	hashes  manifest
}

// reference returns what the plain load gives that has the combination's model and types.
func (r *pairsRig) reference(ctx context.Context, c combination) (*reference, error) {
	p := plain()
	for _, name := range []string{"model", "dtype", "dtype-for", "tensors"} {
		p[numberOf(name)] = c[numberOf(name)]
	}
	p.set("sync=yes hash=write")
	r.mu.Lock()
	defer r.mu.Unlock()
	if ref := r.references[p.String()]; ref != nil {
		return ref, nil
	}
	dir, err := os.MkdirTemp(r.work, "plain")
	if err != nil {
		return nil, err
	}
	o, err := r.command(ctx, p, dir, r.args(p, dir, 0))
	if err == nil && (o.code != exitOK || o.stderr != "") {
		err = fmt.Errorf("exit code %d: %s", o.code, o.stderr)
	}
	ref := &reference{sums: filepath.Join(dir, "sums0")}
	all := newAssembly("none", 1, p)
	if err == nil {
		err = errors.Join(json.Unmarshal([]byte(o.stdout), &ref.report), all.add(filepath.Join(dir, "readback0"), 0))
	}
	if err == nil {
		ref.hashes, err = manifestIn(ref.sums)
	}
	if err != nil {
		return nil, fmt.Errorf("the plain load, %v: %w", p, err)
	}
	ref.tensors = all.tensors
	for _, t := range ref.tensors {
		t.sum, t.bytes = t.sumOf(), nil // the bytes of all references together would be many
	}
	r.references[p.String()] = ref
	return ref, nil
}

func manifestIn(path string) (manifest, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	_, m, err := readManifest(f)
	return m, err
}

// writeExpected writes the file for --expect of one rank: the hashes of the whole tensors, as the plain load gives
// them, and with slices those of a plain load of the same rank. A refused combination needs a file, too.
func (r *pairsRig) writeExpected(ctx context.Context, c combination, dir string, rank int, refused bool) error {
	if !c.is("hash", "expect", "both") {
		return nil
	}
	var from string
	var err error
	switch by, _ := c.world(); {
	case refused:
		from, err = filepath.Join(dir, "none"), os.WriteFile(filepath.Join(dir, "none"), nil, 0o666)
	case by == "tensor":
		from, err = r.hashesOfRank(ctx, c, rank)
	default:
		var ref *reference
		if ref, err = r.reference(ctx, c); err == nil {
			from = ref.sums
		}
	}
	if err != nil {
		return err
	}
	return os.Link(from, filepath.Join(dir, fmt.Sprint("expected", rank)))
}

// hashesOfRank returns a file with the hashes of what a plain load of one rank has: of its slices, or of all tensors.
func (r *pairsRig) hashesOfRank(ctx context.Context, c combination, rank int) (string, error) {
	p := plain()
	same := []string{"model", "tensors"}
	if by, _ := c.world(); by == "tensor" {
		same = append(same, "shard", "shard-rule")
	} else {
		rank = 0 // all tensors are whole
	}
	for _, name := range same {
		p[numberOf(name)] = c[numberOf(name)]
	}
	p.set("dtype=raw sync=yes hash=write")
	if c.is("hash", "blake3") {
		p.set("hash=blake3")
	}
	key := fmt.Sprint(p, rank)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.manifests[key] == "" {
		dir, err := os.MkdirTemp(r.work, "plain")
		if err != nil {
			return "", err
		}
		o, err := r.command(ctx, p, dir, r.args(p, dir, rank))
		if err != nil || o.code != exitOK {
			return "", fmt.Errorf("the plain load of rank %d, %v: exit code %d, %w: %s", rank, p, o.code, err, o.stderr)
		}
		r.manifests[key] = filepath.Join(dir, fmt.Sprint("sums", rank))
	}
	return r.manifests[key], nil
}

// compareHashes compares what --hash wrote with the plain load, and with what was read back, if that is the file's
// bytes.
func (r *pairsRig) compareHashes(ctx context.Context, c combination, dir string, rank int, ref *reference) error {
	got, err := manifestIn(filepath.Join(dir, fmt.Sprint("sums", rank)))
	if err != nil {
		return err
	}
	want := ref.hashes
	sum := sha256.Sum256
	if c.is("hash", "blake3") {
		sum = blake3.Sum256
	}
	if by, _ := c.world(); by == "tensor" || c.is("hash", "blake3") {
		path, err := r.hashesOfRank(ctx, c, rank)
		if err != nil {
			return err
		}
		if want, err = manifestIn(path); err != nil {
			return err
		}
	}
	for name, sum := range got {
		if sum != want[name] {
			return fmt.Errorf("tensor %q has another hash than in the plain load", name)
		}
	}
	if c.is("by", "verify") {
		return nil
	}
	f, err := readSafetensors(filepath.Join(dir, fmt.Sprint("readback", rank)))
	if err != nil {
		return err
	}
	if len(f.tensors) != len(got) {
		return fmt.Errorf("%d tensors have hashes, and %d were loaded", len(got), len(f.tensors))
	}
	for name, t := range f.tensors {
		if t.DType == "U8" && sum(f.bytes(t)) != got[name] {
			return fmt.Errorf("tensor %q has the hash of other bytes than those on the device", name)
		}
	}
	return nil
}

// checkReport compares the report of a load with what the flags say and with the plain load.
func (c combination) checkReport(r *loadReport, rank int, ref *reference) error {
	by, world := c.world()
	n := c.count()
	copies := 1
	if c.is("split", "none") {
		copies = n
	}
	var all deviceShare
	for _, d := range r.Devices {
		all.Tensors += d.Tensors
		all.UploadBytes += d.UploadBytes
		all.DeviceBytes += d.DeviceBytes
		all.ReadBytes += d.ReadBytes
	}
	kind := "soft"
	if !c.is("device", "soft") {
		kind = "hip"
	}
	wantShard := ""
	if by != "none" {
		wantShard = fmt.Sprint(by, rank, world)
	}
	shard := ""
	if r.Shard != nil {
		shard = fmt.Sprint(r.Shard.By, r.Shard.Rank, r.Shard.World)
	}
	verifies := c.is("by", "verify", "load-verify") || c.is("by", "load") && c.is("split", "none")
	remote := c.is("source", "http", "http-parts")
	verified := 0
	if verifies {
		verified = r.Tensors
	}
	proved := 0
	if c.is("prove", "on") {
		proved = r.Tensors
	}
	whole := world == 1
	for _, check := range []struct {
		what string
		ok   bool
	}{
		{"devices", len(r.Devices) == n && r.Device.Kind == kind},
		{"split", (r.Split == "none") == (n > 1 && copies > 1) && (r.Split == "") == (n == 1)},
		{"tensors of the devices", all.Tensors == r.Tensors*copies},
		{"device_bytes of the devices", all.DeviceBytes == r.DeviceBytes},
		{"upload_bytes of the devices", all.UploadBytes == r.UploadBytes && (r.UploadBytes > 0) == (r.ReadBytes > 0)},
		{"read_bytes of the devices", all.ReadBytes == r.ReadBytes*uint64(copies)},
		{"tensors", r.Tensors <= ref.report.Tensors && (r.Tensors == ref.report.Tensors || !whole)},
		{"read_bytes", r.ReadBytes == ref.report.ReadBytes || !whole},
		{"device_bytes", r.DeviceBytes == ref.report.DeviceBytes*uint64(copies) || !whole},
		{"model_tensors", r.ModelTensors == ref.report.ModelTensors},
		{"file_bytes", r.FileBytes == ref.report.FileBytes || !c.is("source", "file", "http")},
		{"bytes by way of reading", r.MappedBytes+r.DirectBytes+r.PlainBytes+r.RemoteBytes == r.ReadBytes},
		{"remote_bytes", r.RemoteBytes == r.ReadBytes || !remote},
		{"connections", r.ReadBytes == 0 || (r.Connections > 0) == remote},
		{"connections at most", r.Connections <= max(3, n) || c.is("connections", "unset")},
		{"chunk_bytes", r.ChunkBytes <= 64<<10 || c.is("staging", "unset", "staging")},
		{"pinned_bytes", r.PinnedBytes <= 192<<10 || !c.is("staging", "staging", "least")},
		{"threads", r.Threads <= max(3, n) || c.is("threads", "unset")},
		{"streams", r.Streams <= 4*n || c.is("streams", "unset")},
		{"scratch_bytes", r.ScratchBytes > 0 == (r.Expanded > 0)},
		{"mapped_bytes", r.MappedBytes == r.ReadBytes || !c.is("io", "mmap")},
		{"direct_bytes", r.DirectBytes+r.PlainBytes == r.ReadBytes || !c.is("io", "direct") || c.is("sync", "yes")},
		{"dequant", r.Dequant != "gpu" || c.is("dequant", "gpu")},
		{"expanded_tensors", (r.Expanded > 0) == (r.Dequant == "gpu")},
		{"verified", r.Verified == verifies && r.VerifiedCount == verified},
		{"proved", r.Proved == c.is("prove", "on") && (r.Unproved != "") == (c.is("prove", "auto") && r.Tensors > 0)},
		{"proved_tensors", r.ProvedCount == proved},
		{"proved_bytes", (r.ProvedBytes > 0) == (proved > 0 && r.ReadBytes > 0)},
		{"proved_bytes of raw tensors", r.ProvedBytes == r.ReadBytes*uint64(copies) || !c.is("dtype", "raw") || proved == 0 ||
			!c.is("dtype-for", "none")},
		{"checked", r.Checked == c.is("check", "yes")},
		{"as_expected", r.AsExpected == c.is("hash", "expect", "both")},
		{"shard", shard == wantShard},
		{"unpinned_copies", r.UnpinnedCopies == 0},
		{"dtype", r.DType == ref.report.DType},
	} {
		if !check.ok {
			text, _ := json.Marshal(r) // as it was read
			return fmt.Errorf("%s in the report is not right (plain load: %d tensors, %d bytes read, %d on the device): %s", check.what,
				ref.report.Tensors, ref.report.ReadBytes, ref.report.DeviceBytes, text)
		}
	}
	return nil
}

// comparePlan compares what load --plan says with what was loaded.
func (r *pairsRig) comparePlan(ctx context.Context, c combination, dir string, rank int, report *loadReport) error {
	loads := slices.Clone(c)
	loads.set("by=load")
	o, err := r.command(ctx, c, dir, append(r.args(loads, dir, rank), "--plan"))
	if err != nil {
		return err
	}
	var plan planReport
	if err := json.Unmarshal([]byte(o.stdout), &plan); err != nil || o.code != exitOK {
		return fmt.Errorf("--plan: exit code %d: %s", o.code, o.stderr)
	}
	if len(plan.Devices) != len(report.Devices) || plan.Split != report.Split {
		return fmt.Errorf("--plan is for %d devices, by %q: %s", len(plan.Devices), plan.Split, o.stdout)
	}
	slicesOf := 0
	for i, p := range plan.Devices {
		d := report.Devices[i]
		if p.deviceReport != d.deviceReport || p.Tensors != d.Tensors || p.DeviceBytes != d.DeviceBytes ||
			p.ReadBytes != d.ReadBytes || !p.Fits {
			return fmt.Errorf("--plan says %+v of a device that got %+v", p, d)
		}
		if slicesOf += p.Slices; report.Split == "none" {
			slicesOf = p.Slices
		}
	}
	if report.Shard == nil {
		return nil
	}
	if len(plan.Ranks) != report.Shard.World || plan.Rank == nil || *plan.Rank != rank || plan.Shard != report.Shard.By ||
		plan.Ranks[rank].Tensors != report.Tensors || plan.Ranks[rank].ReadBytes != report.ReadBytes ||
		plan.Ranks[rank].Slices != report.Shard.Slices || slicesOf != report.Shard.Slices {
		return fmt.Errorf("--plan is not what rank %d has loaded: %s", rank, o.stdout)
	}
	return nil
}
