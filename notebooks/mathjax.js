window.MathJax = { tex: { inlineMath: [["$", "$"], ["\\(", "\\)"]] } };
