package main

import (
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// slurmConf is the configuration of a Slurm whose only node is this host: no accounting, no cgroups, nothing outside of
// its directory, and more CPUs than the host may have, so that every task finds one.
const slurmConf = `ClusterName=test
SlurmctldHost=%[1]s(127.0.0.1)
SlurmUser=%[2]s
SlurmdUser=%[2]s
AuthType=auth/munge
AuthInfo=socket=%[3]s/munge.socket
SlurmctldPort=%[4]d
SlurmdPort=%[5]d
StateSaveLocation=%[3]s/state
SlurmdSpoolDir=%[3]s/spool
SlurmctldPidFile=%[3]s/slurmctld.pid
SlurmdPidFile=%[3]s/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0
SlurmdParameters=config_overrides
NodeName=%[1]s NodeAddr=127.0.0.1 CPUs=16 State=UNKNOWN
PartitionName=test Nodes=%[1]s Default=YES MaxTime=5 State=UP
`

// slurmCluster is a Slurm of this host that lives as long as the test.
type slurmCluster struct{ conf string }

// startSlurm starts munged, slurmctld and slurmd with a key, ports and a directory of their own. The test's end stops
// them, together with all that they have started.
func startSlurm(t *testing.T) *slurmCluster {
	t.Helper()
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin") // where daemons are, which users need not have there
	needEngine(t, "slurm", "munged", "slurmctld", "slurmd", "srun", "sbatch")
	dir := t.TempDir()
	for _, sub := range []string{"state", "spool"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	key := make([]byte, 128)
	rand.Read(key)
	if err := os.WriteFile(filepath.Join(dir, "munge.key"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	host, _, _ = strings.Cut(host, ".")
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	ctldPort, slurmdPort := freePort(t), freePort(t)
	s := &slurmCluster{conf: filepath.Join(dir, "slurm.conf")}
	conf := fmt.Appendf(nil, slurmConf, host, me.Username, dir, ctldPort, slurmdPort)
	if err := os.WriteFile(s.conf, conf, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.conf"), []byte("CgroupPlugin="+noCgroups(t)+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { killAllOf(t, dir) }) // the last to run, before dir is removed
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		logs, _ := filepath.Glob(filepath.Join(dir, "*.log"))
		for _, log := range logs {
			text, _ := os.ReadFile(log)
			t.Logf("%s:\n%s", filepath.Base(log), text)
		}
	})
	socket := filepath.Join(dir, "munge.socket")
	log := func(name string) string { return filepath.Join(dir, name+".log") }
	startDaemon(t, s.env(), log("munged"), func() error { _, err := os.Stat(socket); return err }, "munged", "--foreground", "--force",
		"--socket="+socket, "--key-file="+filepath.Join(dir, "munge.key"), "--pid-file="+filepath.Join(dir, "munged.pid"),
		"--seed-file="+filepath.Join(dir, "munge.seed"))
	startDaemon(t, s.env(), log("slurmctld"), func() error { return dial(ctldPort) }, "slurmctld", "-D", "-i")
	startDaemon(t, s.env(), log("slurmd"), func() error { return dial(slurmdPort) }, "slurmd", "-D")
	// A step tells slurmctld that it has ended, and tries for long if that has ended first.
	t.Cleanup(func() { waitForEnd(dir, "munged", "slurmctld", "slurmscriptd", "slurmd") })
	return s
}

func (s *slurmCluster) env() []string { return append(cleanEnv(), "SLURM_CONF="+s.conf) }

// noCgroups is the plugin for cgroups that leaves them alone. Slurm loads one even where nothing needs it, and what it
// finds by itself may want systemd.
func noCgroups(t *testing.T) string {
	t.Helper()
	out, err := commandOutput(t, cleanEnv(), "slurmd", "-V")
	if err != nil {
		t.Fatalf("slurmd -V: %v\n%s", err, out)
	}
	_, version, _ := strings.Cut(string(out), " ")
	if version >= "23.11" { // year and month, such as 22.05.8
		return "disabled"
	}
	return "cgroup/v1" // does nothing until it is asked to
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func dial(port int) error {
	c, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err == nil {
		c.Close()
	}
	return err
}

// srun runs args as ranks; they may begin with more options of srun.
func (s *slurmCluster) srun(t *testing.T, args ...string) {
	t.Helper()
	command(t, s.env(), "srun", append([]string{"-n", strconv.Itoa(ranksOfTest), "--input=none"}, args...)...)
}

// sbatch runs args in a batch script of as many tasks as there are ranks. It returns the exit code and what the script
// has written.
func (s *slurmCluster) sbatch(t *testing.T, args ...string) (exitCode, string) {
	t.Helper()
	dir := t.TempDir()
	script := "#!/bin/sh\n"
	for _, arg := range args {
		script += " '" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
	}
	// Not sbatch --wait, which looks every few seconds.
	script += "\necho $? >exit.tmp && mv exit.tmp exit\n"
	if err := os.WriteFile(filepath.Join(dir, "job.sh"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	command(t, append(s.env(), launcherEnv(dir)...), "sbatch", "-n", strconv.Itoa(ranksOfTest), "--chdir="+dir, "--output=log",
		filepath.Join(dir, "job.sh"))
	var text []byte
	waitUntil(t, "the batch script", func() (err error) {
		text, err = os.ReadFile(filepath.Join(dir, "exit"))
		return err
	})
	code, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if text, err = os.ReadFile(filepath.Join(dir, "log")); err != nil {
		t.Fatal(err)
	}
	return exitCode(code), string(text)
}
