// The sections that hold every word of a query: those that are called so come first.
const foundSections = (index, query, limit) => {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean), phrase = words.join(" ");
  const score = (entry) => {
    const [title, section, text] = [entry.title, entry.section, entry.text].map((s) => s.toLowerCase());
    const head = `${title} ${section}`, name = section || title;
    if (!words.every((w) => head.includes(w) || text.includes(w))) return 0;
    if (name === phrase) return 5;
    if (name.includes(phrase)) return section ? 3 : 4;
    return words.every((w) => head.includes(w)) || text.includes(phrase) ? 2 : 1;
  };
  const scored = index.map((entry) => [score(entry), entry]).filter(([n]) => n);
  return scored.sort(([a], [b]) => b - a).slice(0, limit).map(([, entry]) => entry);
};

