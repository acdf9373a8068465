//! Another tool in a process of its own, asked for timings over a pipe. It sleeps while we run, and we while it runs.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A running peer.
pub(crate) struct Peer {
    child: Child,
    requests: ChildStdin,
    replies: BufReader<ChildStdout>,
    /// Versions of what it measures, as it said when it started.
    pub(crate) versions: Value,
}

impl Peer {
    /// Starts `script` of `benches/peers`, which answers each line with a line.
    pub(crate) fn start(python: &Path, script: &str, threads: usize) -> Result<Self> {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers");
        let mut command = Command::new(python);
        command.arg(scripts.join(script)).args(["--threads", &threads.to_string()]);
        command.env("OMP_NUM_THREADS", threads.to_string()).env("THP_MEM_ALLOC_ENABLE", "1");
        // On a machine that is not ours alone, threads that spin for one another take each other's time.
        command.env("OMP_WAIT_POLICY", "passive").env("CUDA_VISIBLE_DEVICES", "");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {script}"))?;
        let (Some(requests), Some(replies)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("{script} has no pipes");
        };
        let mut peer = Self { child, requests, replies: BufReader::new(replies), versions: Value::Null };
        peer.versions = peer.reply().with_context(|| format!("{script} did not start"))?;
        Ok(peer)
    }

    /// Makes inputs and outputs of a case, under a handle; the reason when it cannot.
    pub(crate) fn prepare(&mut self, case: &Value) -> Result<std::result::Result<Handle, String>> {
        let reply = self.ask(&json!({"do": "prepare", "case": case}))?;
        match (reply["handle"].as_u64(), reply["skip"].as_str()) {
            (Some(handle), _) => Ok(Ok(Handle(handle))),
            (None, Some(reason)) => Ok(Err(reason.to_owned())),
            _ => bail!("an answer that is none: {reply}"),
        }
    }

    /// Seconds of each of `calls` calls, after `warm_up` that do not count.
    pub(crate) fn time(&mut self, handle: &Handle, warm_up: usize, calls: usize) -> Result<Vec<f64>> {
        let reply = self.ask(&json!({"do": "time", "handle": handle.0, "warm_up": warm_up, "calls": calls}))?;
        let seconds = reply["seconds"].as_array().context("an answer without seconds")?;
        Ok(seconds.iter().filter_map(Value::as_f64).collect())
    }

    /// Frees what `prepare` made.
    pub(crate) fn drop_all(&mut self) -> Result<()> {
        self.ask(&json!({"do": "drop"})).map(drop)
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        writeln!(self.requests, "{request}")?;
        self.requests.flush()?;
        self.reply().with_context(|| format!("no answer to {request}"))
    }

    fn reply(&mut self) -> Result<Value> {
        let mut line = String::new();
        // What libraries print is no answer.
        while !line.starts_with('{') {
            line.clear();
            if self.replies.read_line(&mut line)? == 0 {
                bail!("the peer has ended ({:?})", self.child.try_wait()?);
            }
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A prepared case.
pub(crate) struct Handle(u64);
