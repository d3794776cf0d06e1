"""The scripts against a cloud of one folder: a fake gcloud that loses connections when told to."""

import os
import pathlib
import shutil
import subprocess
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
# $CLOUD holds bucket/, state (of the slice) and home/ (of its one host); each line of $CLOUD/lost
# is a call, as a pattern, that gets no answer, once.
GCLOUD = """
echo "$*" >> $CLOUD/calls
while read -r lost; do
  if [[ "$*" == *$lost* ]]; then
    sed -i 1d $CLOUD/lost; echo "ssh: connection reset by peer" >&2; exit 255
  fi; break
done < $CLOUD/lost
object=$CLOUD/bucket/${@: -1}; object=${object/gs:\\/\\//}
case "$*" in
  *queued-resources\\ describe*)
    cat $CLOUD/state 2>/dev/null || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; } ;;
  *queued-resources\\ create*)
    mkdir -p $CLOUD/home; set -o noclobber; echo ACTIVE > $CLOUD/state ;;
  *queued-resources\\ delete*)
    rm $CLOUD/state || exit 1; kill $(cat $CLOUD/home/tmux-*); rm -rf $CLOUD/home ;;
  *ssh*) cd $CLOUD/home && HOME=$PWD exec bash -c "${@: -1}" ;;
  storage\\ cat*) cat $object ;;
  storage\\ ls*) [[ -e $object ]] ;;
  storage\\ rm*)
    rm $object || { echo "ERROR: The following URLs matched no objects or files:" >&2; exit 1; } ;;
  storage\\ cp*)
    source=${@: -2:1}; mkdir -p ${object%/*}; cat ${source/#-/\\/dev/stdin} > $object.$$
    # As in a bucket: an object is seen whole or not at all, and of two first ones one is refused.
    if [[ "$*" == *match=0* ]]; then ln $object.$$ $object; else mv $object.$$ $object; fi ;;
esac
"""
PYTHON3 = """
mkdir -p ~/.local/bin
printf '%s\\n' '#!/bin/bash' 'echo "$*" >> $CLOUD/uv' 'mkdir -p .venv/bin' \\
  'cp $CLOUD/program .venv/bin/python' > ~/.local/bin/uv
chmod +x ~/.local/bin/uv
"""
TMUX = """
[[ $1 == has-session ]] && { kill -0 $(cat $HOME/tmux-${3#=}); exit; }  # the shell's own kill
shift 3; echo $$ > $HOME/tmux-$1; exec setsid "${@:2}" > /dev/null 2>&1 &
echo $! > $HOME/tmux-$1
"""
PROGRAM = """
echo "$(cat VERSION) $*" >> $CLOUD/starts
until [[ -e $CLOUD/end ]]; do sleep 0.05; done
. $CLOUD/end
"""
DONE = "echo {} > $CLOUD/bucket/mine/runs/d16/summary.json"


class Cloud:
    """A checkout with the scripts, and the fakes that they run against."""

    def __init__(self, folder):
        self.folder, self.checkout = folder, folder / "checkout"
        shutil.copytree(LAUNCH, self.checkout / "launch")
        (folder / "bucket" / "mine" / "runs" / "d16").mkdir(parents=True)
        (folder / "lost").touch()
        (folder / "bin").mkdir()
        fakes = {"gcloud": GCLOUD, "python3": PYTHON3, "tmux": TMUX, "sleep": "/bin/sleep 0.02"}
        for name, body in fakes.items():
            self.script(folder / "bin" / name, body)
        self.script(folder / "program", PROGRAM)
        self.commit("one")

    def script(self, path, body):
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def commit(self, version):
        (self.checkout / "VERSION").write_text(version)
        git = ["git", "-C", self.checkout, "-c", "user.name=n", "-c", "user.email=e"]
        for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", version]):
            subprocess.run([*git, *words], check=True)

    def watch(self):
        env = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "CLOUD": str(self.folder)}
        env |= {"NAME": "d16", "PROJECT": "p", "BUCKET": "gs://mine"}
        return subprocess.Popen(
            [self.checkout / "launch" / "watch.sh"], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def lines(self, name):
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def ssh_calls(self):
        return sum(" ssh " in call for call in self.lines("calls"))

    def until(self, holds):
        end = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < end, self.lines("calls")[-20:]
            time.sleep(0.05)

    def end(self, how):
        """Lets the program end with the shell line `how`."""
        (self.folder / "beside").write_text(how)
        os.replace(self.folder / "beside", self.folder / "end")


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def finished(cloud, watch, code=0):
    """What a watch.sh said that ended with `code` and gave the slice back."""
    out, err = watch.communicate(timeout=30)
    assert watch.returncode == code, err
    assert not (cloud.folder / "state").exists()
    return out


def test_a_run_outlives_lost_connections_preemption_and_new_commits(cloud):
    watch = cloud.watch()
    cloud.until(lambda: cloud.lines("starts"))
    cloud.commit("two")  # in the operator's checkout
    (cloud.folder / "lost").write_text(" ssh \n" * 3 + "describe\ndescribe\nstorage ls\n")
    cloud.until(lambda: not cloud.lines("lost"))
    calls = cloud.ssh_calls()
    cloud.until(lambda: cloud.ssh_calls() > calls + 2)
    assert len(cloud.lines("starts")) == 1 and len(cloud.lines("uv")) == 2  # venv and install
    assert not any("delete" in call for call in cloud.lines("calls"))

    (cloud.folder / "state").write_text("SUSPENDED\n")
    cloud.until(lambda: len(cloud.lines("starts")) == 2)
    assert [line.split()[0] for line in cloud.lines("starts")] == ["one", "one"]
    flags = "--config imagenet:d16 --workdir gs://mine/runs/d16 --distributed"
    assert flags in cloud.lines("starts")[1]
    (cloud.folder / "lost").write_text("queued-resources delete\n")  # which would cost money
    cloud.end(DONE)
    finished(cloud, watch)


def test_only_what_is_refused_ends_a_run_and_no_other_exit_code(cloud):
    watch = cloud.watch()
    cloud.end("echo 'error: the disk is full' >&2; exit 1")
    cloud.until(lambda: len(cloud.lines("starts")) > 2)
    assert watch.poll() is None and (cloud.folder / "state").exists()
    cloud.end("echo 'error: no such field' >&2; exit 2")
    assert "error: no such field\n" in finished(cloud, watch, code=2)


def test_two_watchers_are_as_good_as_one(cloud):
    watchers = [cloud.watch(), cloud.watch()]
    cloud.until(lambda: cloud.lines("starts"))
    calls = cloud.ssh_calls()
    cloud.until(lambda: cloud.ssh_calls() > calls + 8)
    # Before the end: the host of a slice that one deletes may still hear the other begin.
    assert len(cloud.lines("uv")) == 2
    cloud.end(DONE)
    for watch in watchers:
        finished(cloud, watch)
    assert len(cloud.lines("starts")) == 1


def test_code_that_is_not_committed_is_refused_before_anything_costs_money(cloud):
    (cloud.checkout / "VERSION").write_text("edited")
    watch = cloud.watch()
    _, err = watch.communicate(timeout=30)
    assert watch.returncode == 1 and "not committed: commit them, or set COMMIT" in err
    assert not any("create" in call for call in cloud.lines("calls"))


def test_a_finished_run_goes_on_when_a_command_is_given_again(cloud):
    for marks in (["summary.json"], ["summary.json", ".done"]):
        for name in marks:
            (cloud.folder / "bucket" / "mine" / "runs" / "d16" / name).touch()
        before = len(cloud.lines("starts"))
        (cloud.folder / "lost").write_text("storage rm\n")  # the marks must be gone all the same
        (cloud.folder / "end").unlink(missing_ok=True)
        watch = cloud.watch()
        cloud.until(lambda n=before: len(cloud.lines("starts")) == n + 1)
        calls = cloud.ssh_calls()
        cloud.until(lambda n=calls: cloud.ssh_calls() > n + 2)
        assert watch.poll() is None
        cloud.end("exit 0")
        finished(cloud, watch)
