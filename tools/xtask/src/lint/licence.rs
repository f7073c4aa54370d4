//! Licence expressions (SPDX 2.3, annex D), as far as crates use them: AND, OR, WITH and parentheses.

/// Whether `allowed` licences are enough to use something under `expression`. A slash is the old way to write OR.
/// An expression that makes no sense allows nothing.
pub(super) fn satisfied(expression: &str, allowed: &[&str]) -> bool {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    let mut parser = Parser {
        words: &mut words,
        allowed,
    };
    parser.any() == Some(true) && parser.words.next().is_none()
}

struct Parser<'a, 'b, W: Iterator<Item = &'a str>> {
    words: &'b mut std::iter::Peekable<W>,
    allowed: &'b [&'b str],
}

impl<'a, W: Iterator<Item = &'a str>> Parser<'a, '_, W> {
    fn any(&mut self) -> Option<bool> {
        let mut satisfied = self.all()?;
        while self.words.next_if_eq(&"OR").is_some() {
            satisfied |= self.all()?;
        }
        Some(satisfied)
    }

    fn all(&mut self) -> Option<bool> {
        let mut satisfied = self.one()?;
        while self.words.next_if_eq(&"AND").is_some() {
            satisfied &= self.one()?;
        }
        Some(satisfied)
    }

    fn one(&mut self) -> Option<bool> {
        let word = self.words.next()?;
        if word == "(" {
            let satisfied = self.any()?;
            return (self.words.next()? == ")").then_some(satisfied);
        }
        if self.words.next_if_eq(&"WITH").is_none() {
            return Some(self.allowed.contains(&word));
        }
        let exception = self.words.next()?;
        Some(
            self.allowed
                .contains(&format!("{word} WITH {exception}").as_str()),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        let allowed = [
            "MIT",
            "Apache-2.0",
            "BSD-3-Clause",
            "Apache-2.0 WITH LLVM-exception",
        ];
        for good in [
            "MIT",
            "GPL-2.0 OR MIT",
            "GPL-2.0/MIT",
            "MIT AND BSD-3-Clause",
            "(MIT OR GPL-2.0) AND BSD-3-Clause",
            "GPL-2.0 AND X OR MIT",
            "Apache-2.0 WITH LLVM-exception",
        ] {
            assert!(satisfied(good, &allowed), "{good}");
        }
        for bad in [
            "",
            "GPL-2.0",
            "MIT AND GPL-2.0",
            "(MIT OR GPL-2.0) AND X",
            "MIT WITH other-exception",
            "(MIT",
            "MIT OR",
            "MIT MIT",
        ] {
            assert!(!satisfied(bad, &allowed), "{bad}");
        }
    }
}
