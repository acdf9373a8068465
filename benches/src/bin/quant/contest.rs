//! One kernel of ours against its anchors: in turns, in short units, with the roof of the same minutes.

use anyhow::Result;
use pt_benches::median;
use pt_quant::{Exec, roof};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use crate::peer::{Handle, Peer};

/// Rounds of a contest; in each, every side has a batch of calls.
const ROUNDS: usize = 10;
/// Seconds of a batch, where a call is shorter.
const BATCH_SECONDS: f64 = 0.03;
/// A contest whose roof is further than this from the median of all is repeated, and at last not judged.
const STEADY: f64 = 0.15;
const ATTEMPTS: usize = 3;

/// Everything that contests share.
pub(crate) struct Bench {
    pub(crate) threads: usize,
    /// torch and bitsandbytes.
    torch: Option<Peer>,
    ggml: Option<Peer>,
    roof_buffer: Vec<f32>,
    roof_turn: usize,
    roofs: Vec<f64>,
    only: Vec<u8>,
}

impl Bench {
    pub(crate) fn new(threads: usize, torch: Option<&Path>, ggml: Option<&Path>, only: Vec<u8>) -> Result<Self> {
        let start =
            |python: Option<&Path>, script| python.map(|python| Peer::start(python, script, threads)).transpose();
        let (torch, ggml) = (start(torch, "quant_torch.py")?, start(ggml, "quant_ggml.py")?);
        let mut bench =
            Self { threads, torch, ggml, roof_buffer: vec![1.0; 64 << 20], roof_turn: 0, roofs: Vec::new(), only };
        let samples: Vec<f64> = (0..100).map(|_| bench.read_once()).collect();
        bench.roofs.push(ROOF_BYTES / p10(samples) / 1e9);
        Ok(bench)
    }

    /// The threads that our kernels may use. The whole suite runs in a rayon pool of that many.
    pub(crate) fn exec(&self) -> Exec<'static> {
        if self.threads == 1 { Exec::single() } else { Exec::new() }
    }

    pub(crate) fn wants(&self, row: u8) -> bool {
        self.only.is_empty() || self.only.contains(&row)
    }

    pub(crate) fn versions(&self) -> Value {
        let of = |peer: &Option<Peer>| peer.as_ref().map_or(Value::Null, |peer| peer.versions.clone());
        json!({"torch": of(&self.torch), "ggml": of(&self.ggml), "read_roof_gb_s": self.roofs.first()})
    }

    /// Seconds of reading a part of memory that no cache holds.
    fn read_once(&mut self) -> f64 {
        let parts = self.roof_buffer.len() / ROOF_LEN;
        self.roof_turn = (self.roof_turn + 1) % parts;
        let part = &self.roof_buffer[self.roof_turn * ROOF_LEN..][..ROOF_LEN];
        let exec = self.exec();
        timed(&mut || _ = black_box(roof::read(part, &exec)), self.threads)
    }

    /// `ours` is one call of a kernel.
    pub(crate) fn contest<'a>(&'a mut self, row: u8, kernel: &str, ours: impl FnMut() + 'a) -> Contest<'a> {
        let ours = Side::Here(Box::new(ours));
        Contest { bench: self, row, kernel: kernel.to_owned(), ours, anchors: Vec::new(), work: json!({}) }
    }
}

/// Elements of a read of the roof: 32 MiB.
const ROOF_LEN: usize = 8 << 20;
const ROOF_BYTES: f64 = (4 * ROOF_LEN) as f64;

/// A kernel and what it is held against.
pub(crate) struct Contest<'a> {
    bench: &'a mut Bench,
    row: u8,
    kernel: String,
    ours: Side<'a>,
    anchors: Vec<Anchor<'a>>,
    work: Value,
}

struct Anchor<'a> {
    what: String,
    side: Side<'a>,
    gate: Option<f64>,
    aim: Option<f64>,
}

enum Side<'a> {
    Here(Box<dyn FnMut() + 'a>),
    Torch(Value),
    Ggml(Value),
}

/// How many times an anchor's time our time must go into it: the gate, and the aim.
pub(crate) type Targets = (Option<f64>, Option<f64>);

impl<'a> Contest<'a> {
    /// What one call does, for rates: weights, operations, bytes.
    pub(crate) fn work(mut self, what: &str, amount: f64) -> Self {
        self.work[what] = amount.into();
        self
    }

    /// Against torch or bitsandbytes.
    pub(crate) fn torch(self, what: &str, case: Value, targets: Targets) -> Self {
        self.anchor(what, Side::Torch(case), targets)
    }

    /// Against a kernel of ggml.
    pub(crate) fn ggml(self, what: &str, case: Value, targets: Targets) -> Self {
        self.anchor(what, Side::Ggml(case), targets)
    }

    /// Against something that runs in this process: a roof, or a plainer kernel of ours.
    pub(crate) fn here(self, what: &str, call: impl FnMut() + 'a, targets: Targets) -> Self {
        self.anchor(what, Side::Here(Box::new(call)), targets)
    }

    fn anchor(mut self, what: &str, side: Side<'a>, (gate, aim): Targets) -> Self {
        self.anchors.push(Anchor { what: what.to_owned(), side, gate, aim });
        self
    }

    /// Measures, and prints one line of JSON.
    pub(crate) fn run(mut self) -> Result<()> {
        let mut line = Value::Null;
        for attempt in 1..=ATTEMPTS {
            line = self.attempt()?;
            line["attempts"] = attempt.into();
            let roof = line["read_roof_gb_s"].as_f64().unwrap_or(0.0);
            self.bench.roofs.push(roof);
            if is_near(roof, median(self.bench.roofs.clone())) {
                break;
            }
        }
        println!("{line}");
        Ok(())
    }

    fn attempt(&mut self) -> Result<Value> {
        let mut sides = vec![Measured::new(&mut self.ours, self.bench)?];
        for anchor in &mut self.anchors {
            sides.push(Measured::new(&mut anchor.side, self.bench)?);
        }
        let mut roofs = Vec::new();
        for round in 0..ROUNDS {
            roofs.extend([self.bench.read_once(), self.bench.read_once()]);
            // The order turns, so that nobody always runs after the same neighbour.
            for turn in 0..sides.len() {
                let index = (round + turn) % sides.len();
                sides[index].batch(self.bench)?;
            }
        }
        for peer in [&mut self.bench.torch, &mut self.bench.ggml].into_iter().flatten() {
            peer.drop_all()?;
        }
        let times: Vec<_> =
            sides.into_iter().map(|side| (side.skipped, side.seconds.len(), p10(side.seconds))).collect();
        let (_, samples, ours) = times[0].clone();
        let anchors = self.anchors.iter().zip(&times[1..]).map(|(anchor, (skipped, samples, seconds))| {
            let mut line = json!({"what": anchor.what, "gate": anchor.gate, "aim": anchor.aim});
            match skipped {
                Some(reason) => line["skipped"] = reason.as_str().into(),
                None => {
                    line["microseconds"] = rounded(seconds * 1e6);
                    line["samples"] = (*samples).into();
                    line["ratio"] = rounded(seconds / ours);
                }
            }
            line
        });
        let rates: serde_json::Map<String, Value> = self
            .work
            .as_object()
            .into_iter()
            .flatten()
            .filter_map(|(name, amount)| Some((format!("{name}_per_s"), rounded(amount.as_f64()? / ours))))
            .collect();
        Ok(json!({
            "row": self.row, "kernel": self.kernel, "threads": self.bench.threads, "microseconds": rounded(ours * 1e6),
            "samples": samples, "rates": rates, "anchors": anchors.collect::<Vec<_>>(),
            "read_roof_gb_s": rounded(ROOF_BYTES / p10(roofs) / 1e9),
        }))
    }
}

/// One side and its samples so far.
struct Measured<'s, 'a> {
    side: &'s mut Side<'a>,
    handle: Option<Handle>,
    skipped: Option<String>,
    calls: usize,
    seconds: Vec<f64>,
}

impl<'s, 'a> Measured<'s, 'a> {
    fn new(side: &'s mut Side<'a>, bench: &mut Bench) -> Result<Self> {
        let (mut handle, mut skipped) = (None, None);
        let (peer, case) = match side {
            Side::Here(_) => (&mut None, &Value::Null),
            Side::Torch(case) => (&mut bench.torch, &*case),
            Side::Ggml(case) => (&mut bench.ggml, &*case),
        };
        match (peer, case) {
            (_, Value::Null) => {}
            (Some(peer), case) => match peer.prepare(case)? {
                Ok(ready) => handle = Some(ready),
                Err(reason) => skipped = Some(reason),
            },
            (None, _) => skipped = Some("the peer is not there".to_owned()),
        }
        let mut measured = Self { side, handle, skipped, calls: 1, seconds: Vec::new() };
        // Memory is touched and code compiled by the first calls; the shortest of the next tells how long one takes when
        // nobody disturbs it.
        let first = measured.call(bench, 0, 1)?.last().copied().unwrap_or(1.0);
        let next = if first < 0.1 { measured.call(bench, 2, 5)? } else { vec![first] };
        let shortest = next.into_iter().fold(f64::INFINITY, f64::min);
        measured.calls = ((BATCH_SECONDS / shortest) as usize).clamp(1, 200);
        Ok(measured)
    }

    fn batch(&mut self, bench: &mut Bench) -> Result<()> {
        // What ran before has emptied the caches.
        let warm_up = if self.calls > 4 { 2 } else { 0 };
        let seconds = self.call(bench, warm_up, self.calls)?;
        self.seconds.extend(seconds);
        Ok(())
    }

    fn call(&mut self, bench: &mut Bench, warm_up: usize, calls: usize) -> Result<Vec<f64>> {
        if self.skipped.is_some() {
            return Ok(Vec::new());
        }
        let of_peer = |peer: &mut Option<Peer>| match (peer, &self.handle) {
            (Some(peer), Some(handle)) => peer.time(handle, warm_up, calls),
            _ => Ok(Vec::new()),
        };
        match &mut self.side {
            Side::Here(call) => {
                (0..warm_up).for_each(|_| call());
                Ok((0..calls).map(|_| timed(call, bench.threads)).collect())
            }
            Side::Torch(_) => of_peer(&mut bench.torch),
            Side::Ggml(_) => of_peer(&mut bench.ggml),
        }
    }
}

/// Whether a roof is so near the usual one that what was measured under it counts.
pub(crate) fn is_near(roof: f64, usual: f64) -> bool {
    (roof / usual - 1.0).abs() <= STEADY
}

/// Seconds of a call. A long one is interrupted by other programs, however often it is repeated: on one thread, what
/// counts of it is the processor's time. The peers are timed in the same way.
fn timed(call: &mut dyn FnMut(), threads: usize) -> f64 {
    let cpu_time = || {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
    };
    let before = cpu_time();
    let start = Instant::now();
    call();
    let seconds = start.elapsed().as_secs_f64();
    if threads == 1 && seconds > LONG_SECONDS { cpu_time() - before } else { seconds }
}

/// Longer calls are timed by the processor's clock of this process.
const LONG_SECONDS: f64 = 0.001;

/// The time that a tenth of the calls undercut: what the kernel takes when nobody disturbs it.
fn p10(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 10).copied().unwrap_or(f64::NAN)
}

/// Four digits.
fn rounded(value: f64) -> Value {
    if !value.is_finite() || value == 0.0 {
        return Value::Null;
    }
    let unit = 10f64.powf(value.abs().log10().floor() - 3.0);
    let rounded = (value / unit).round() * unit;
    // 0.1 + 0.2 would show all its digits.
    format!("{rounded:.6}").parse::<f64>().map_or(Value::Null, Value::from)
}
