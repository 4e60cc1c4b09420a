// The sections that hold every word of a query: those that are called so come first, and among
// these the chapters before the reference.
const foundSections = (index, query, limit) => {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean), phrase = words.join(" ");
  const score = (entry) => {
    const [title, section, text] = [entry.title, entry.section, entry.text].map((s) => s.toLowerCase());
    const head = `${title} ${section}`, name = section || title;
    if (!words.every((w) => head.includes(w) || text.includes(w))) return 0;
    const later = entry.href.startsWith("reference/") ? 3 : 0;
    if (name === phrase) return 10 - later;
    if (name.includes(phrase)) return (section ? 6 : 8) - later;
    return words.every((w) => head.includes(w)) || text.includes(phrase) ? 5 - later : 4 - later;
  };
  const scored = index.map((entry) => [score(entry), entry]).filter(([n]) => n);
  return scored.sort(([a], [b]) => b - a).slice(0, limit).map(([, entry]) => entry);
};

