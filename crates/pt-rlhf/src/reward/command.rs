//! Scores by a program of the user's own, in any language.
//!
//! The program is started once per batch. On its standard input it finds one JSON object per line and sample, with
//! `prompt`, `response`, `is_ended` and `fields` (all fields of the prompt's row); on its standard output it prints one
//! line per sample, in the same order: a number, or an object with a number as `score`. What it says on standard error
//! is shown when it fails. A scorer in Python:
//!
//! ```python
//! import json, sys
//! for line in sys.stdin:
//!     sample = json.loads(line)
//!     print(float(sample["fields"]["answer"] in sample["response"]))
//! ```

use std::io::{ErrorKind, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Fault, Reward, Sample, excerpt, refused};
use crate::error::Result;

/// Longest time that a scorer may be given: about 12 days.
const LONGEST_TIMEOUT: f64 = 1e6;
/// What a scorer may print in bytes, and in addition for each sample. More than that is no list of scores.
const OUTPUT_LIMIT: usize = 1 << 20;
const OUTPUT_LIMIT_PER_SAMPLE: usize = 1 << 16;
/// How much of the end of its standard error is kept, in bytes, and shown, in lines.
const ERRORS_KEPT: usize = 8192;
const ERRORS_SHOWN: usize = 8;
/// How long the end of standard error is waited for once the program has failed, and for a killed program to go.
const GRACE: Duration = Duration::from_secs(2);

/// A reward that a program gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CommandConfig {
    /// Name in metrics; null for `command`.
    pub name: Option<String>,
    /// Factor of the score in the sum of rewards.
    pub weight: f64,
    /// The program and its arguments, `[python3, score.py]`; no shell is between, `[sh, -c, "a | b"]` starts one. It
    /// reads one JSON object per line and sample (`prompt`, `response`, `is_ended`, `fields`) and prints one number, or
    /// {"score": number}, per line.
    pub command: Vec<String>,
    /// Seconds that one batch may take before the program and all that it started are stopped.
    pub timeout: f64,
}

impl Default for CommandConfig {
    fn default() -> Self {
        Self { name: None, weight: 1.0, command: Vec::new(), timeout: 60.0 }
    }
}

impl CommandConfig {
    /// Every fault, each naming its field, what it is and what was expected.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        match self.command.first() {
            None => faults.push("command is empty, expected a program and its arguments".into()),
            Some(program) if program.trim().is_empty() => {
                faults.push(format!("command[0] is {program:?}, expected a program"));
            }
            Some(_) => {}
        }
        if let Some(index) = self.command.iter().position(|part| part.contains('\0')) {
            faults.push(format!("command[{index}] holds a NUL character, expected a text without"));
        }
        if !(self.timeout > 0.0 && self.timeout <= LONGEST_TIMEOUT) {
            faults.push(format!("timeout is {}, expected seconds, over 0 to {LONGEST_TIMEOUT}", self.timeout));
        }
        faults
    }
}

/// Scores by a program; see [`CommandConfig`].
///
/// The run can go on after a failure: nothing is kept from one batch to the next.
pub struct ExternalCommand {
    name: String,
    command: Vec<String>,
    timeout: Duration,
}

impl ExternalCommand {
    /// Under a name for metrics. The program is not started before there are samples.
    ///
    /// # Errors
    /// [`RlhfError::Config`](crate::RlhfError::Config) with every fault of the configuration.
    pub fn new(name: &str, config: &CommandConfig) -> Result<Self> {
        match (config.faults(), Duration::try_from_secs_f64(config.timeout)) {
            (faults, Ok(timeout)) if faults.is_empty() => {
                Ok(Self { name: name.to_owned(), command: config.command.clone(), timeout })
            }
            (faults, _) => Err(refused(name, faults)),
        }
    }

    fn scores(&self, samples: &[Sample<'_>]) -> std::result::Result<Vec<f64>, Fault> {
        let input = input_lines(samples)?;
        let limit = samples.len().saturating_mul(OUTPUT_LIMIT_PER_SAMPLE).saturating_add(OUTPUT_LIMIT);
        let output = Scorer::start(&self.command, input, limit)?.finish(self.timeout)?;
        parse_scores(&output, samples)
    }
}

impl Reward for ExternalCommand {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<f64>> {
        if samples.is_empty() {
            return Ok(Vec::new());
        }
        self.scores(samples).map_err(|fault| fault.into_error(&self.name))
    }
}

/// What the program finds on its standard input, for a sample.
#[derive(Serialize)]
struct Line<'a> {
    prompt: &'a str,
    response: &'a str,
    is_ended: bool,
    fields: &'a Map<String, Value>,
}

fn input_lines(samples: &[Sample<'_>]) -> std::result::Result<Vec<u8>, Fault> {
    let mut lines = Vec::new();
    for &Sample { prompt, response, is_ended, fields, .. } in samples {
        serde_json::to_writer(&mut lines, &Line { prompt, response, is_ended, fields })
            .map_err(|error| Fault::new(format!("a sample has no JSON form: {error}"), "look at the row's fields"))?;
        lines.push(b'\n');
    }
    Ok(lines)
}

/// The scores in what the program printed; lines of space alone do not count.
fn parse_scores(output: &[u8], samples: &[Sample<'_>]) -> std::result::Result<Vec<f64>, Fault> {
    let text = String::from_utf8_lossy(output);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let hint = "it prints one number, or {\"score\": number}, per sample on standard output, in order; anything else \
                goes to standard error";
    let scores: Vec<_> = lines.iter().map(|line| parse_score(line)).collect();
    let first_bad = scores.iter().position(Option::is_none);
    if lines.len() != samples.len() {
        let odd = first_bad.map_or_else(String::new, |bad| format!("; line {} is {}", bad + 1, excerpt(lines[bad])));
        return Err(Fault::new(format!("printed {} lines for {} samples{odd}", lines.len(), samples.len()), hint));
    }
    if let Some(bad) = first_bad {
        let response = excerpt(samples[bad].response);
        let found = excerpt(lines[bad]);
        let message = format!("line {}, for the response {response}, is {found}, expected a finite number", bad + 1);
        return Err(Fault::new(message, hint));
    }
    Ok(scores.into_iter().flatten().collect())
}

fn parse_score(line: &str) -> Option<f64> {
    let number = match serde_json::from_str::<Value>(line) {
        Ok(Value::Object(fields)) => fields.get("score")?.as_f64(),
        Ok(value) => value.as_f64(),
        // `1.` and `+1` are no JSON, and numbers all the same.
        Err(_) => line.parse().ok(),
    };
    number.filter(|number: &f64| number.is_finite())
}

/// What the threads at the pipes have to tell.
enum Event {
    /// Standard output to its end.
    Output(Vec<u8>),
    /// It goes on beyond its limit.
    TooMuch,
    /// It cannot be read.
    Unreadable(std::io::Error),
    /// Standard error has ended.
    ErrorsEnded,
}

/// A running program with a thread at each of its pipes, so that none of them fills up while another is waited for.
/// Stopped with all that it started when dropped.
struct Scorer {
    child: Child,
    events: Receiver<Event>,
    errors: Arc<Mutex<Vec<u8>>>,
    has_ended: bool,
}

impl Scorer {
    fn start(words: &[String], input: Vec<u8>, limit: usize) -> std::result::Result<Self, Fault> {
        let (program, arguments) = words.split_first().ok_or_else(|| Fault::new("no program".into(), "name one"))?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A process group of its own: a time limit stops what the program started, too, and an interrupt at the
        // keyboard leaves it alone, so that the step at hand can be finished.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().map_err(|error| {
            let hint = match error.kind() {
                ErrorKind::NotFound => "check the path; `command` is a list, the program first and no shell between",
                ErrorKind::PermissionDenied => "make it executable, or name its interpreter first: [python3, score.py]",
                _ => "check the program and its arguments",
            };
            Fault::new(format!("cannot start `{program}`: {error}"), hint)
        })?;
        let (sender, events) = mpsc::channel();
        let errors = Arc::new(Mutex::new(Vec::new()));
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let scorer = Self { child, events, errors: Arc::clone(&errors), has_ended: false };
        let no_thread = |error| Fault::new(format!("cannot start a thread: {error}"), "stop other programs");
        if let Some(mut stdin) = stdin {
            // A scorer need not read all it is given; whether its answer is whole is seen at the other end.
            spawn("scorer-input", move || drop(stdin.write_all(&input))).map_err(no_thread)?;
        }
        if let Some(stdout) = stdout {
            let sender = sender.clone();
            spawn("scorer-output", move || drop(sender.send(read_output(stdout, limit)))).map_err(no_thread)?;
        }
        if let Some(stderr) = stderr {
            spawn("scorer-errors", move || keep_tail(stderr, &errors, &sender)).map_err(no_thread)?;
        }
        Ok(scorer)
    }

    /// What the program printed, once it has ended well.
    fn finish(mut self, timeout: Duration) -> std::result::Result<Vec<u8>, Fault> {
        let started = Instant::now();
        let left = || timeout.saturating_sub(started.elapsed());
        let output = loop {
            match self.events.recv_timeout(left()) {
                Ok(Event::Output(output)) => break output,
                Ok(Event::ErrorsEnded) => {}
                Ok(Event::TooMuch) => {
                    self.stop();
                    let hint =
                        "it prints one number per sample on standard output; anything else goes to standard error";
                    return Err(Fault::new("printed more than a list of scores can be, and was stopped".into(), hint));
                }
                Ok(Event::Unreadable(error)) => {
                    return Err(Fault::new(format!("what it prints cannot be read: {error}"), "try again"));
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Err(self.overdue(timeout)),
            }
        };
        // Its output has ended, and as a rule so has the program.
        let mut pause = Duration::from_millis(1);
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if left().is_zero() => return Err(self.overdue(timeout)),
                Ok(None) => thread::sleep(pause.min(left())),
                Err(error) => return Err(Fault::new(format!("cannot be waited for: {error}"), "try again")),
            }
            pause = (pause * 2).min(Duration::from_millis(20));
        };
        self.has_ended = true;
        if status.success() { Ok(output) } else { Err(self.failed(status)) }
    }

    /// The time is over: the program is stopped, and what it did says which fault it is.
    fn overdue(&mut self, timeout: Duration) -> Fault {
        let status = self.stop();
        let seconds = timeout.as_secs_f64();
        match status {
            // It had ended before it was stopped.
            Some(status) if status.code().is_some_and(|code| code != 0) => self.failed(status),
            Some(status) if status.success() => Fault::new(
                format!("ended, but something that it started kept its output open for {seconds} s, and was stopped"),
                "let the program wait for what it starts, or send the output of that elsewhere",
            ),
            _ => Fault::new(
                format!("did not answer within {seconds} s, and was stopped{}", self.errors_text()),
                "raise `timeout`, or find what it waits for; the run can be resumed from its last checkpoint",
            ),
        }
    }

    fn failed(&self, status: ExitStatus) -> Fault {
        // What it said last is on its way still.
        let until = Instant::now() + GRACE;
        while let Ok(event) = self.events.recv_timeout(until.saturating_duration_since(Instant::now())) {
            if matches!(event, Event::ErrorsEnded) {
                break;
            }
        }
        Fault::new(
            format!("failed with {status}{}", self.errors_text()),
            "run the program by hand on a line of JSON; the run can be resumed from its last checkpoint",
        )
    }

    /// The end of what it said on standard error, to go on a message.
    fn errors_text(&self) -> String {
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&errors);
        let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        match &lines[lines.len().saturating_sub(ERRORS_SHOWN)..] {
            [] => ", and nothing on standard error".into(),
            last => format!("; the end of its standard error:\n    {}", last.join("\n    ")),
        }
    }

    /// Stops the program and all that it started; how it ended, where that could be seen.
    fn stop(&mut self) -> Option<ExitStatus> {
        // Nobody has waited for the child yet, so its id is still its own and that of its group.
        stop_group(&self.child);
        // It may have gone by now, which is no fault.
        drop(self.child.kill());
        self.has_ended = true;
        // A process in the hands of a broken disk does not even die: it is waited for in vain for so long only.
        let until = Instant::now() + GRACE;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < until => thread::sleep(Duration::from_millis(2)),
                Ok(None) | Err(_) => return None,
            }
        }
    }
}

impl Drop for Scorer {
    fn drop(&mut self) {
        if !self.has_ended {
            self.stop();
        }
    }
}

/// The standard library signals a child alone; the shell's own `kill` reaches its group.
#[cfg(unix)]
fn stop_group(child: &Child) {
    let group = format!("-{}", child.id());
    let mut kill = Command::new("sh");
    // `-s KILL --` is the form that all shells take for a group.
    kill.args(["-c", "kill -s KILL -- \"$1\"", "sh", &group]);
    kill.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // Where there is no shell the child is killed nevertheless, by the caller.
    drop(kill.status());
}

#[cfg(not(unix))]
fn stop_group(_: &Child) {}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(work).map(drop)
}

fn read_output(mut stdout: impl Read, limit: usize) -> Event {
    let mut output = Vec::new();
    let mut chunk = vec![0; 1 << 16];
    loop {
        match stdout.read(&mut chunk) {
            Ok(0) => return Event::Output(output),
            Ok(count) => output.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Event::Unreadable(error),
        }
        if output.len() > limit {
            return Event::TooMuch;
        }
    }
}

/// Reads standard error to its end, however much that is, and keeps the last of it.
fn keep_tail(mut stderr: impl Read, errors: &Mutex<Vec<u8>>, sender: &Sender<Event>) {
    let mut chunk = [0; 4096];
    loop {
        match stderr.read(&mut chunk) {
            Ok(count) if count > 0 => {
                let mut kept = errors.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&chunk[..count]);
                let excess = kept.len().saturating_sub(ERRORS_KEPT);
                kept.drain(..excess);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(_) | Err(_) => break,
        }
    }
    // Nobody listens any more once the scores are there.
    drop(sender.send(Event::ErrorsEnded));
}

#[cfg(all(test, unix))]
mod tests {
    use super::super::testing::*;
    use super::super::{RewardSpec, checked_scores};
    use super::*;

    fn shell(script: &str, timeout: f64) -> ExternalCommand {
        let command = ["sh", "-c", script].map(str::to_owned).to_vec();
        ExternalCommand::new("judge", &CommandConfig { command, timeout, ..CommandConfig::default() }).expect("good")
    }

    fn score(script: &str, responses: &[&str]) -> Result<Vec<f64>> {
        let fields = row(r#"{"answer":"4"}"#);
        let samples: Vec<_> = responses.iter().map(|response| sample(response, &fields)).collect();
        checked_scores(&mut shell(script, 30.0), &samples)
    }

    fn message(script: &str, responses: &[&str]) -> String {
        let error = score(script, responses).expect_err(script);
        assert!(error.hint().is_some());
        error.to_string()
    }

    #[test]
    fn it_reads_a_line_per_sample_and_prints_a_score_per_line() {
        let script = "while read -r line; do echo ${#line}; done";
        let line = r#"{"prompt":"q","response":"a\nb","is_ended":true,"fields":{"answer":"4"}}"#;
        assert_eq!(score(script, &["a\nb", "a\nbcd"]).expect("scores"), [line.len() as f64, line.len() as f64 + 2.0]);
        assert!(score("exit 7", &[]).expect("not started for nothing").is_empty());
    }

    #[test]
    fn numbers_and_objects_with_a_score_are_read() {
        let script = r#"printf '%s\n' 1 -2.5e-1 '' '{"score": 3, "why": "so"}' '+.5' ' 7. ' '{"score": -0.0}'"#;
        assert_eq!(score(script, &["a", "b", "c", "d", "e", "f"]).expect("scores"), [1.0, -0.25, 3.0, 0.5, 7.0, 0.0]);
    }

    #[test]
    fn lines_that_are_no_number_are_named() {
        for bad in
            ["good", "nan", "inf", "1e999", "null", "true", "[1]", "{\"score\": null}", "{\"reward\": 1}", "\\377"]
        {
            let text = message(&format!("printf '1\\n%b\\n' '{bad}'"), &["a", "b c"]);
            assert!(text.contains("reward `judge`: line 2, for the response \"b c\", is \""), "{text}");
            assert!(text.ends_with("expected a finite number"), "{text}");
        }
    }

    #[test]
    fn a_wrong_number_of_lines_is_named() {
        assert!(message("true", &["a"]).ends_with("printed 0 lines for 1 samples"));
        let text = message("echo Loading the model; echo 1; echo 2", &["a", "b"]);
        assert!(text.ends_with("printed 3 lines for 2 samples; line 1 is \"Loading the model\""), "{text}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let config = CommandConfig { command: vec!["./no-such-scorer".into()], ..CommandConfig::default() };
        let fields = row("{}");
        let mut reward = ExternalCommand::new("judge", &config).expect("not started yet");
        let error = checked_scores(&mut reward, &[sample("a", &fields)]).expect_err("not there");
        assert!(error.to_string().starts_with("reward `judge`: cannot start `./no-such-scorer`: "), "{error}");
        assert!(error.hint().expect("a hint").contains("check the path"));
    }

    #[test]
    fn a_crash_shows_the_end_of_standard_error() {
        let text = message("for i in 1 2 3 4 5 6 7 8 9 10; do echo line $i >&2; done; exit 3", &["a"]);
        assert!(
            text.starts_with("reward `judge`: failed with exit status: 3; the end of its standard error:"),
            "{text}"
        );
        assert!(text.ends_with("\n    line 9\n    line 10") && !text.contains("line 2\n"), "{text}");
        assert!(message("echo 1; exit 1", &["a"]).ends_with("exit status: 1, and nothing on standard error"));
        assert!(message("kill -9 $$", &["a"]).contains("failed with signal: 9"));
    }

    #[test]
    fn a_program_that_hangs_is_stopped_with_all_that_it_started() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("pid");
        let script = format!("echo thinking >&2; sleep 300 & echo $! > {}; wait", file.display());
        let fields = row("{}");
        let started = Instant::now();
        let error = shell(&script, 0.5).score(&[sample("a", &fields)]).expect_err("too slow");
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        let text = error.to_string();
        assert!(text.contains("did not answer within 0.5 s, and was stopped; the end of its"), "{text}");
        assert!(text.ends_with("thinking") && error.hint().expect("a hint").contains("`timeout`"), "{text}");
        let pid = std::fs::read_to_string(file).expect("written before it hung");
        assert!(is_gone(pid.trim()), "process {pid} is still there");
    }

    /// Whether a process has ended, if need be in a moment; one that nobody has waited for counts as ended.
    fn is_gone(pid: &str) -> bool {
        let state = || {
            let output = Command::new("ps").args(["-o", "stat=", "-p", pid]).output().expect("ps");
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        };
        (0..100).any(|_| {
            thread::sleep(Duration::from_millis(20));
            matches!(state().chars().next(), None | Some('Z'))
        })
    }

    #[test]
    fn a_program_that_closes_its_output_and_goes_on_is_stopped() {
        let fields = row("{}");
        let error = shell("echo 1; exec >&- 2>&-; sleep 300", 0.3).score(&[sample("a", &fields)]).expect_err("hangs");
        assert!(error.to_string().contains("did not answer within 0.3 s"), "{error}");
    }

    #[test]
    fn output_held_open_by_a_child_is_told_from_a_hang() {
        let fields = row("{}");
        let error = shell("sleep 300 & echo 1", 0.5).score(&[sample("a", &fields)]).expect_err("held open");
        assert!(error.to_string().contains("ended, but something that it started kept its output open"), "{error}");
        let error = shell("sleep 300 & exit 4", 0.5).score(&[sample("a", &fields)]).expect_err("held open");
        assert!(error.to_string().contains("failed with exit status: 4"), "{error}");
        // Standard error alone is nobody's answer.
        let scores = shell("sleep 3 >&- & echo 1", 30.0).score(&[sample("a", &fields)]).expect("an answer");
        assert_eq!(scores, [1.0]);
    }

    #[test]
    fn full_pipes_do_not_lock_up() {
        let long = "x".repeat(1 << 20);
        let responses = [long.as_str(); 4];
        // Prints before it reads, more than a pipe holds, to both.
        let flood = "i=0; while [ $i -lt 3000 ]; do echo 'a line of some length that says nothing at all' >&2; \
                     i=$((i+1)); done; printf '%100000s\\n' ' '; cat > /dev/null; printf '1\\n2\\n3\\n4\\n'";
        assert_eq!(score(flood, &responses).expect("scores"), [1.0, 2.0, 3.0, 4.0]);
        // Never reads.
        assert_eq!(score("printf '1\\n2\\n3\\n4\\n'", &responses).expect("scores"), [1.0, 2.0, 3.0, 4.0]);
        // Closes its input at once.
        assert_eq!(score("exec <&-; sleep 0.1; printf '1\\n2\\n3\\n4\\n'", &responses).expect("scores").len(), 4);
    }

    #[test]
    fn endless_output_is_cut_off() {
        let started = Instant::now();
        let text = message("yes 1", &["a"]);
        assert!(text.contains("printed more than a list of scores can be, and was stopped"), "{text}");
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_failure_leaves_the_next_batch_alone() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("seen").display().to_string();
        let mut reward = shell(&format!("if [ -e {file} ]; then echo 1; else touch {file}; exit 1; fi"), 30.0);
        let fields = row("{}");
        assert!(reward.score(&[sample("a", &fields)]).is_err());
        assert_eq!(reward.score(&[sample("a", &fields)]).expect("the second time"), [1.0]);
    }

    #[test]
    fn faults_are_listed_at_once() {
        assert_eq!(CommandConfig::default().faults(), ["command is empty, expected a program and its arguments"]);
        for timeout in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e30] {
            let config = CommandConfig { command: vec![" ".into(), "a\0".into()], timeout, ..CommandConfig::default() };
            assert_eq!(config.faults().len(), 3, "{timeout}");
            assert!(ExternalCommand::new("c", &config).is_err());
        }
        let spec: RewardSpec =
            serde_json::from_str(r#"{"type":"command","command":["a","b"],"timeout":5}"#).expect("ok");
        assert!(spec.faults().is_empty());
    }
}
