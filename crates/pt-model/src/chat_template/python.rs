//! How Python prints: `str`, `repr`, `json.dumps` and `strftime`, as far as templates show them.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, Output};
use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// Prints `{{ value }}`.
pub(super) fn write_str(out: &mut Output<'_>, value: &Value) -> Result<(), Error> {
    let text = str(value);
    out.write_str(&text).map_err(|_| Error::new(ErrorKind::WriteFailure, "cannot write the rendered text"))
}

/// `str(value)`; an undefined value prints nothing.
pub(super) fn str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().map_or_else(|| value.to_string(), str::to_string),
        _ => repr(value),
    }
}

fn repr(value: &Value) -> String {
    let list = |value: &Value| -> Vec<Value> { value.try_iter().map(Iterator::collect).unwrap_or_default() };
    match value.kind() {
        ValueKind::None => "None".into(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float)
        }
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq => format!("[{}]", list(value).iter().map(repr).collect::<Vec<_>>().join(", ")),
        ValueKind::Map => {
            let entry = |key: &Value| {
                format!("{}: {}", repr(key), value.get_item(key).map(|item| repr(&item)).unwrap_or_default())
            };
            format!("{{{}}}", list(value).iter().map(entry).collect::<Vec<_>>().join(", "))
        }
        _ => value.to_string(),
    }
}

/// `repr` of a string: single quotes unless that would need escaping and double quotes would not.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if (c as u32) < 0x20 || (0x7f..0xa1).contains(&(c as u32)) || c == '\u{ad}' => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// `repr` of a float: the shortest digits, with an exponent below 1e-4 and from 1e16.
pub(super) fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if number != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{number:?}"),
    }
}

/// The arguments of `json.dumps`.
pub(super) struct JsonFormat {
    /// Spaces a level, each item on its own line; `None` for one line.
    pub(super) indent: Option<usize>,
    /// Escape everything beyond ASCII.
    pub(super) is_ascii: bool,
    /// Between items, and between a key and its value.
    pub(super) separators: (String, String),
}

impl JsonFormat {
    /// `json.dumps(value)`.
    pub(super) fn to_string(&self, value: &serde_json::Value) -> String {
        let mut out = String::new();
        self.write(&mut out, value, 0);
        out
    }

    fn write(&self, out: &mut String, value: &serde_json::Value, depth: usize) {
        use serde_json::Value;
        match value {
            Value::Array(items) if !items.is_empty() => {
                self.write_items(out, depth, ('[', ']'), items, |out, item| self.write(out, item, depth + 1));
            }
            Value::Object(entries) if !entries.is_empty() => {
                self.write_items(out, depth, ('{', '}'), entries, |out, (key, item)| {
                    self.write_string(out, key);
                    out.push_str(&self.separators.1);
                    self.write(out, item, depth + 1);
                });
            }
            Value::String(text) => self.write_string(out, text),
            Value::Number(number) if number.is_f64() => out.push_str(&float(number.as_f64().unwrap_or_default())),
            other => out.push_str(&other.to_string()),
        }
    }

    fn write_items<T>(
        &self,
        out: &mut String,
        depth: usize,
        brackets: (char, char),
        items: impl IntoIterator<Item = T>,
        mut write: impl FnMut(&mut String, T),
    ) {
        let new_line = |out: &mut String, depth: usize| {
            if let Some(indent) = self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent * depth));
            }
        };
        out.push(brackets.0);
        for (i, item) in items.into_iter().enumerate() {
            if i > 0 {
                out.push_str(&self.separators.0);
            }
            new_line(out, depth + 1);
            write(out, item);
        }
        new_line(out, depth);
        out.push(brackets.1);
    }

    fn write_string(&self, out: &mut String, text: &str) {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.is_ascii {
            out.push_str(&quoted);
            return;
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// `strftime` of a moment, in UTC. (transformers takes the local time; a run should not depend on where it runs.)
/// A directive that templates have no use for is left as it stands.
pub(super) fn strftime(format: &str, moment: SystemTime) -> String {
    let seconds = moment.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
    let (days, second_of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Days since 0000-03-01, in eras of 400 years, as in Howard Hinnant's `civil_from_days`.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (month_name, day_name) = (MONTHS[(month - 1) as usize], DAYS[(days + 4).rem_euclid(7) as usize]);
    let hour = second_of_day / 3_600;

    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = rest.next();
        let is_bare = directive == Some('-');
        let directive = if is_bare { rest.next() } else { directive };
        let mut number = |value: i64, width: usize| {
            let _ = if is_bare { write!(out, "{value}") } else { write!(out, "{value:0width$}") };
        };
        match directive {
            Some('Y') => number(year, 4),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('H') => number(hour, 2),
            Some('I') => number((hour + 11) % 12 + 1, 2),
            Some('M') => number(second_of_day % 3_600 / 60, 2),
            Some('S') => number(second_of_day % 60, 2),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('%') => out.push('%'),
            other => {
                out.push('%');
                out.extend(is_bare.then_some('-'));
                out.extend(other);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn floats_print_as_in_python() {
        let cases = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (1e15, "1000000000000000.0"),
            (-0.0, "-0.0"),
            (0.0001, "0.0001"),
        ];
        for (number, expected) in cases {
            assert_eq!(float(number), expected);
        }
    }

    #[test]
    fn dates_print_as_in_python() {
        let moment = UNIX_EPOCH + Duration::from_secs(1_709_211_845);
        assert_eq!(
            strftime("%A %d %B %Y, %H:%M:%S %-d %b %y %%", moment),
            "Thursday 29 February 2024, 13:04:05 29 Feb 24 %"
        );
        assert_eq!(strftime("%d %b %Y", UNIX_EPOCH), "01 Jan 1970");
    }
}
