//! Numbers out of many.

/// The middle one, or the mean of the two in the middle; nothing of nothing.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    if values.len() % 2 == 1 {
        return Some(upper);
    }
    Some((values.get(middle.checked_sub(1)?)? + upper) / 2.0)
}

/// The share of those for which something holds; nothing of nothing.
pub(crate) fn share<T>(values: &[T], holds: impl Fn(&T) -> bool) -> Option<f64> {
    let count = values.iter().filter(|value| holds(value)).count();
    (!values.is_empty()).then(|| count as f64 / values.len() as f64)
}

/// The largest; nothing of nothing.
pub(crate) fn largest(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    values.into_iter().max_by(f64::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn middles_shares_and_ends() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median([]), None);
        assert_eq!(share(&[1, 2, 3, 4], |n| *n > 1), Some(0.75));
        assert_eq!(share(&[0; 0], |_| true), None);
        assert_eq!(largest([1.0, 5.0, 2.0]), Some(5.0));
        assert_eq!(largest([]), None);
    }
}
