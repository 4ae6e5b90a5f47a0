// Eyes for tests/test_site.py: every text of a page with its contrast against what is painted behind it.
// axe leaves out the text of drawings, and what it cannot decide: here shapes below a text count, too.
() => {
    const pen = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }).getContext('2d', { willReadFrequently: true });
    const known = {};
    const rgba = (colour) => known[colour] ??= (() => {
        pen.clearRect(0, 0, 1, 1);
        pen.fillStyle = colour;
        pen.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    })();
    const over = ([r, g, b, a], ground) => [r, g, b].map((c, i) => c * a + ground[i] * (1 - a));
    const light = (colour) => colour.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ratio = (one, other) => {
        const [high, low] = [light(one), light(other)].sort((a, b) => b - a);
        return (high + 0.05) / (low + 0.05);
    };
    const memo = (f, cache = new Map()) => (e) => cache.has(e) ? cache.get(e) : cache.set(e, f(e)).get(e);
    const style = memo((e) => getComputedStyle(e));
    // what is painted behind an element: nothing but paper, or its ancestors' grounds
    const paper = matchMedia('print').matches;
    const behind = memo((e) => e && !paper ? over(rgba(style(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255]);
    // an element's opacity; 0 and 1 are the frames of a film, which are seen at some time
    const opacity = memo((e) => e?.tagName ? (+style(e).opacity || 1) * opacity(e.parentElement) : 1);
    const paint = (e, kind) => {
        const [r, g, b, a] = rgba(style(e)[kind]);
        return [r, g, b, a * opacity(e) * (kind === 'fill' ? style(e).fillOpacity : 1)];
    };
    const weak = [];
    let texts = 0;
    const judge = (e, words, colour, ground, scale = 1) => {
        const size = scale * parseFloat(style(e).fontSize);
        const large = size >= 24 || (size >= 18.66 && style(e).fontWeight >= 700);
        const contrast = ratio(over(colour, ground), ground);
        texts += 1;
        if (contrast < (large ? 3 : 4.5)) weak.push(`${contrast.toFixed(2)} : 1 ${words.trim().slice(0, 40)} (${e.outerHTML.slice(0, 90)})`);
    };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; (node = walker.nextNode());) {
        const e = node.parentElement;
        if (!node.data.trim() || e.closest('script, style, noscript, mjx-assistive-mml, svg')) continue;
        if (e.checkVisibility({ visibilityProperty: true, opacityProperty: true })) judge(e, node.data, paint(e, 'color'), behind(e));
    }
    for (const svg of document.querySelectorAll('article .picture svg')) {
        const shapes = [...svg.querySelectorAll('rect, path, circle, polygon, text')].filter((e) => !e.closest('defs'));
        const frame = memo((e) => e.closest('svg > g[opacity]'));
        const place = memo((e) => e.getScreenCTM());
        const filled = memo((e) => e.isPointInFill && style(e).fill !== 'none' && e.getBoundingClientRect());
        const clip = memo((e) => {
            const by = e.closest('[clip-path]')?.getAttribute('clip-path').match(/#([^)'"]+)/)[1];
            return by && document.getElementById(by).querySelector('rect, path');
        });
        const covers = (e, x, y) => {
            const point = new DOMPoint(x, y).matrixTransform(place(e).inverse());
            return e.isPointInFill(point) && (!clip(e) || clip(e).isPointInFill(point));
        };
        shapes.forEach((text, i) => {
            if (text.tagName !== 'text' || !text.textContent.trim()) return;
            const box = text.getBoundingClientRect(), to = place(text);
            const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
            const below = shapes.slice(0, i).filter((e) => {
                const r = (!frame(e) || frame(e) === frame(text)) && filled(e);
                return r && r.left <= x && x <= r.right && r.top <= y && y <= r.bottom
                    && covers(e, x, y);
            });
            const ground = below.reduce((sum, e) => over(paint(e, 'fill'), sum), behind(svg));
            judge(text, text.textContent, paint(text, 'fill'), ground, Math.hypot(to.a, to.b));
        });
    }
    return { texts, weak };
}
