//! Numbers as people and models write them in a text.
//!
//! | text | read as |
//! | --- | --- |
//! | `42`, `3.`, `0.50`, `.5`, `6e-3` | 42, 3, 0.5, 0.5, 0.006 |
//! | `1,234,567.8` | 1234567.8; `1,2,3` and `1,2345` are lists |
//! | `-3`, `+3`, `−3`, `x=-3` | with their sign; in `5-3` and `2024-05-06` a hyphen is none, nor before a space |
//! | `$1,200`, `-$5` | 1200, −5 |
//! | `3/4`, `-1/2`, `2 1/2` | 0.75, −0.5, 2.5; `12/05/2024` is three numbers |
//! | `50%`, `50\%` | 50, marked as a percentage |
//!
//! Commas are separators of thousands, never decimal commas. A fraction over 0, and a number larger than `f64` holds,
//! is passed over.

/// A number of a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Quantity {
    /// As written, before the percent sign counts. Finite.
    pub(super) value: f64,
    /// Whether a percent sign follows.
    pub(super) is_percent: bool,
}

/// All numbers of a text, in order. Takes time linear in its length.
pub(super) fn numbers(text: &str) -> Vec<Quantity> {
    let chars: Vec<char> = text.chars().collect();
    let (mut found, mut at) = (Vec::new(), 0);
    while at < chars.len() {
        match number_at(&chars, at) {
            Some((number, end)) => {
                found.extend(number);
                at = end;
            }
            None => at += 1,
        }
    }
    found
}

/// The number that begins at `at`, and where it ends; `Some((None, end))` for one that has no value.
fn number_at(chars: &[char], at: usize) -> Option<(Option<Quantity>, usize)> {
    let previous = at.checked_sub(1).and_then(|before| chars.get(before)).copied();
    // After a letter, a digit or a closing bracket a hyphen joins or subtracts, and a point ends something.
    let is_joined = previous.is_some_and(|c| c.is_alphanumeric() || matches!(c, ')' | ']' | '}' | '%'));
    let mut start = at;
    let mut sign = 1.0;
    match chars.get(at)? {
        '-' | '−' | '+' if is_joined => return None,
        '-' | '−' => (sign, start) = (-1.0, at + 1),
        '+' => start = at + 1,
        '.' if is_joined => return None,
        _ => {}
    }
    if matches!(chars.get(start), Some('$' | '€' | '£' | '¥')) {
        start += 1;
    }
    let first = unsigned_at(chars, start)?;
    let (mut value, mut end) = (first.value, first.end);
    let is_whole = first.is_digits;
    if previous != Some('/') && chars.get(end) == Some(&'/') {
        if let Some(denominator) = denominator_at(chars, end + 1) {
            value /= denominator.value;
            end = denominator.end;
        }
    } else if is_whole
        && chars.get(end) == Some(&' ')
        && let Some((fraction, after)) = proper_fraction_at(chars, end + 1)
    {
        value += fraction;
        end = after;
    }
    let percent = match (chars.get(end), chars.get(end + 1)) {
        (Some('%'), _) => 1,
        (Some('\\'), Some('%')) => 2,
        _ => 0,
    };
    let number = value.is_finite().then_some(Quantity { value: sign * value, is_percent: percent > 0 });
    Some((number, end + percent))
}

/// A number without a sign.
struct Unsigned {
    /// At least 0, may be infinite.
    value: f64,
    /// Nothing but digits: no separator, point or exponent.
    is_digits: bool,
    /// Where what follows it begins.
    end: usize,
}

fn unsigned_at(chars: &[char], start: usize) -> Option<Unsigned> {
    let mut text: String = chars.get(start..start + run(chars, start))?.iter().collect();
    let mut end = start + text.len();
    let is_group = (1..=3).contains(&text.len()) && !text.starts_with('0');
    while is_group && chars.get(end) == Some(&',') && run(chars, end + 1) == 3 {
        text.extend(&chars[end + 1..end + 4]);
        end += 4;
    }
    let decimals = if chars.get(end) == Some(&'.') { run(chars, end + 1) } else { 0 };
    if decimals > 0 {
        text.extend(&chars[end..=end + decimals]);
        end += 1 + decimals;
    }
    if text.is_empty() {
        return None;
    }
    if let Some(length) = exponent_length(chars, end) {
        text.extend(chars[end..end + length].iter().map(|&c| if c == '−' { '-' } else { c }));
        end += length;
    }
    let is_digits = end - start == run(chars, start);
    Some(Unsigned { value: text.parse().ok()?, is_digits, end })
}

/// Length of `e5`, `E-3`; none where letters or digits go on, as in `3em` and `5e3f`.
fn exponent_length(chars: &[char], at: usize) -> Option<usize> {
    if !matches!(chars.get(at), Some('e' | 'E')) {
        return None;
    }
    let sign = usize::from(matches!(chars.get(at + 1), Some('-' | '−' | '+')));
    let digits = run(chars, at + 1 + sign);
    let goes_on = chars.get(at + 1 + sign + digits).is_some_and(|c| c.is_alphanumeric());
    (digits > 0 && !goes_on).then_some(1 + sign + digits)
}

/// What a fraction's bar is followed by: a number, and no second bar, which would make it a date.
fn denominator_at(chars: &[char], start: usize) -> Option<Unsigned> {
    chars.get(start).filter(|c| c.is_ascii_digit())?;
    unsigned_at(chars, start).filter(|number| !is_bar_of_date(chars, number.end))
}

fn is_bar_of_date(chars: &[char], at: usize) -> bool {
    chars.get(at) == Some(&'/') && chars.get(at + 1).is_some_and(char::is_ascii_digit)
}

/// `1/2` in `2 1/2`: whole numbers, less than 1.
fn proper_fraction_at(chars: &[char], start: usize) -> Option<(f64, usize)> {
    let above = unsigned_at(chars, start).filter(|number| number.is_digits && chars.get(number.end) == Some(&'/'))?;
    let below = denominator_at(chars, above.end + 1).filter(|number| number.is_digits)?;
    (above.value < below.value && below.value.is_finite()).then_some((above.value / below.value, below.end))
}

/// How many digits stand from `at` on.
fn run(chars: &[char], at: usize) -> usize {
    chars.get(at..).unwrap_or_default().iter().take_while(|c| c.is_ascii_digit()).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(text: &str) -> Vec<f64> {
        numbers(text).into_iter().map(|number| number.value).collect()
    }

    #[test]
    fn numbers_are_read_as_they_are_written() {
        let cases: &[(&str, &[f64])] = &[
            ("", &[]),
            ("no digits, 'e', - or . here", &[]),
            ("42", &[42.0]),
            ("The answer is 72.", &[72.0]),
            ("0.50 and .5 and 007", &[0.5, 0.5, 7.0]),
            ("1,234,567.8 then 1,2,3 then 1,2345", &[1_234_567.8, 1.0, 2.0, 3.0, 1.0, 2345.0]),
            ("12,345,67 and 0,123", &[12345.0, 67.0, 0.0, 123.0]),
            ("-3 +4 −5 x=-6 (-7)", &[-3.0, 4.0, -5.0, -6.0, -7.0]),
            ("5-3=2, 10 - 4 = 6, (1)-2, 2024-05-06", &[5.0, 3.0, 2.0, 10.0, 4.0, 6.0, 1.0, 2.0, 2024.0, 5.0, 6.0]),
            ("3--5", &[3.0, -5.0]),
            ("$1,200 and -$5 and €7 and $5-$10", &[1200.0, -5.0, 7.0, 5.0, 10.0]),
            ("3/4, -1/2, 6/3.", &[0.75, -0.5, 2.0]),
            ("2 1/2 cups, 3 4 5, 3 7/2", &[2.5, 3.0, 4.0, 5.0, 3.0, 3.5]),
            ("-1 1/2", &[-1.5]),
            ("12/05/2024 and 1/2/3", &[12.0, 5.0, 2024.0, 1.0, 2.0, 3.0]),
            ("5/0 is nothing", &[]),
            ("1/2/ and 4/x", &[0.5, 4.0]),
            ("6e-3 1E5 2e 3em 5e3f 1.5e+2", &[0.006, 1e5, 2.0, 3.0, 5.0, 3.0, 150.0]),
            ("1.2.3 v2 x10y", &[1.2, 3.0, 2.0, 10.0]),
            ("#### 1,000", &[1000.0]),
            ("٣ ½ ²", &[]),
        ];
        for (text, expected) in cases {
            assert_eq!(values(text), *expected, "{text:?}");
        }
    }

    #[test]
    fn percentages_are_marked() {
        let marks = |text: &str| numbers(text).into_iter().map(|n| (n.value, n.is_percent)).collect::<Vec<_>>();
        assert_eq!(marks("50%, 12.5\\% and 7"), [(50.0, true), (12.5, true), (7.0, false)]);
        assert_eq!(marks("-1/2% 5 % 3"), [(-0.5, true), (5.0, false), (3.0, false)]);
    }

    #[test]
    fn numbers_beyond_f64_are_passed_over() {
        assert!(values(&"9".repeat(400)).is_empty());
        assert_eq!(values("1e999 8"), [8.0]);
        assert_eq!(values(&format!("1/{}", "9".repeat(400))), [0.0]);
        assert_eq!(values(&format!("{0}/{0} 2", "9".repeat(400))), [2.0], "infinity over infinity is no number");
    }

    #[test]
    fn reading_takes_linear_time() {
        // Long runs of each part of the grammar: quadratic reading would take minutes.
        for part in ["1", ",", "1,", "1,234", ".", "1.", "1/", "-", "e1", "1 1/2 ", "9/", "$", "1e", "1 "] {
            numbers(&part.repeat(200_000 / part.len()));
        }
    }

    fn grouped(whole: u64) -> String {
        let digits = whole.to_string();
        let mut text = String::new();
        for (index, digit) in digits.chars().enumerate() {
            if index > 0 && (digits.len() - index).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        text
    }

    proptest! {
        #[test]
        fn any_text_gives_finite_numbers(
            text in prop_oneof![".{0,40}", r"[0-9,.+−/% $€eExa)(\]\[\n½é٣\\-]{0,40}", "[0-9,./ -]{0,20}"],
        ) {
            prop_assert!(numbers(&text).iter().all(|number| number.value.is_finite()));
        }

        #[test]
        fn what_rust_prints_is_read_back_exactly(number in any::<f64>().prop_filter("finite", |n| n.is_finite())) {
            for text in [format!("{number}"), format!("{number:e}"), format!("so it is {number}, I think")] {
                prop_assert_eq!(values(&text), [number], "{}", text);
            }
        }

        #[test]
        fn separators_signs_and_fractions_change_no_value(
            whole in prop_oneof![0..2000_u64, any::<u64>()], decimals in 0..1000_u32, below in 1..1000_u32,
        ) {
            let (text, value) = (grouped(whole), whole as f64);
            prop_assert_eq!(values(&format!("is ${text}.")), [value]);
            prop_assert_eq!(values(&format!("(-{text})")), [-value]);
            let decimal: f64 = format!("{whole}.{decimals:03}").parse().expect("a number");
            prop_assert_eq!(values(&format!("{text}.{decimals:03}")), [decimal]);
            prop_assert_eq!(values(&format!("{text}/{below}")), [value / f64::from(below)]);
        }
    }
}
